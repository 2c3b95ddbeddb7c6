"""Options of a compression block by block: what is refused, and what goes on, or is gone, after an interruption."""

import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.modeling.folders_mcsmoe import WORK
from hf_mcsmoe.streamed.journal import BLOCKS, RESULT, Journal

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")
KEPT = "what is finished is kept; the same command goes on"
GOES_ON = "block by block, as the run to this output that was interrupted"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture
def given(models: Path, tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """Return a command line but for the output."""
    path = models / "moe"
    if not path.exists():
        build("mixtral").save_pretrained(path)
        tokenizer.save_pretrained(path)
        (models / "text.txt").write_text("\n".join(f"what is {n} {n % 7}" for n in range(8)))
    options = ["--data", models / "text.txt", "--max-length", 8, "--experts", 0.5, "--repair", "none"]
    return ["compress", path, *options]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--memory", "abc"], "--memory abc is no amount of memory: give bytes"),
        (["--memory", "0.5"], "--memory 0.5 is no amount of memory"),
        (["--no-stream", "--restart"], "--no-stream loads the model, where --restart has nothing to say"),
        (["--no-stream", "--memory", "8GB"], "where --memory has nothing to say"),
    ],
)
def test_options_that_say_nothing(options: list[str], told: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("compress", tmp_path / "no", "--data", "no.txt", *options, "--output", tmp_path / "out")
    assert code == 1
    assert told in err


def _ended(state: str, how: BaseException, monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[int, str, str]:
    """Run a command that an error ends when its journal has been saved in a state for the second time."""
    saves, write = iter(range(100)), Journal.save

    def save(self: Journal) -> None:
        write(self)
        if self.state == state and next(saves) == (state == BLOCKS):
            raise how

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", save)
        return call()


def test_an_interrupted_run(given: list[Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, work = tmp_path / "out", tmp_path / f".out{WORK}"
    call = partial(run, *given, "--output", output)
    code, _, err = _ended(BLOCKS, SystemExit(143), monkeypatch, partial(call, "--stream"))
    assert code == 143
    assert KEPT in err
    full = OSError(errno.ENOSPC, "No space left on device")
    code, _, err = _ended(RESULT, full, monkeypatch, call)
    assert code == 1, "the same without --stream, which had been chosen by itself"
    assert GOES_ON in err
    assert KEPT in err
    output.mkdir()
    (output / "config.json").write_text("{}")
    code, _, err = call("--restart")
    assert code == 1
    assert "is not empty" in err
    code, _, err = call("--no-stream", "--overwrite")
    assert code == 0, err
    assert "removed what a run block by block" in err
    assert not work.exists()
    assert GOES_ON not in err
    code, _, err = call("--restart")
    assert code == 1
    assert "--restart did nothing" in err


@pytest.mark.slow
def test_a_size_is_the_same_block_by_block(given: list[Any], run: Run, tmp_path: Path) -> None:
    command, outputs = [*given[:6], "--size", 0.6, "--bits", "8,4", "--reduce", "prune"], []
    for way in ("--stream", "--no-stream"):
        outputs.append(tmp_path / way / "out")
        scores = ["--scores", tmp_path / way / "scores.safetensors"]
        outputs[-1].parent.mkdir()
        code, _, err = run(*command, way, *scores, "--output", outputs[-1])
        assert code == 0, err
    ours, theirs = (
        {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()} for out in outputs
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    curves = [RoutingStatistics.load(out.parent / "scores.safetensors").curves for out in outputs]
    assert curves[0] == curves[1] != {}
