"""Settings of every test: one thread, no network, remote code copied to a folder of this run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mcsmoe-modules-")
# Processes that tests start run on one thread as well: there is a worker for each core.
os.environ["OMP_NUM_THREADS"] = "1"
# Bit for bit means the same kernels, and MKL chooses some of them by where in memory a tensor lies, which for one
# read from a file is elsewhere.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)


# Each file runs in one process, which makes its fixtures once. Files that start many processes go first, or one worker
# would end long after the other.
LONGEST_FIRST = [
    *("modeling/test_families_roundtrip.py", "test_readme.py", "low_rank/test_decompose.py"),
    *("modeling/test_checkpoint.py", "modeling/test_saving.py", "low_rank/test_sparsification.py"),
    *("cli/test_cli_distill.py", "cli/test_cli.py", "cli/test_refinement.py", "test_demo.py"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tiny models of the families, and their batches, be elsewhere."""
    parser.addoption("--device", default="cpu", help="where the tests' models are: cpu (default), cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Tell the module that makes the models."""
    os.environ["HF_MCSMOE_TEST_DEVICE"] = config.getoption("--device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by their length, as far as it is known."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_unconfigure() -> None:
    """Remove the copied code."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words and the digits, whose padding is a token of its own."""
    words = ["<pad>", "</s>", "<unk>", "what", "is", "it", *map(str, range(10))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line and returns its exit code, standard output and error."""
    from hf_mcsmoe import cli
    from hf_mcsmoe.cli import display

    monkeypatch.setenv("COLUMNS", "160")
    for console in (display.console, display.notes):  # whatever the window that the tests are run in
        monkeypatch.setattr(console, "_width", 160)
        monkeypatch.setattr(console, "_height", 50)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hf-mcsmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, " ".join(captured.err.split())

    return call
