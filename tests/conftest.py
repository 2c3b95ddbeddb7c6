"""Settings of every test: one thread, no network, remote code copied to a folder of this run."""

import os
import tempfile
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mcsmoe-modules-")
# Bit for bit means the same kernels, and MKL chooses some of them by where in memory a tensor lies, which for one
# read from a file is elsewhere.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import shutil

import pytest
import torch

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Remove the copied code."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command line and returns its exit code, standard output and error."""
    from hf_mcsmoe import cli

    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hf-mcsmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, " ".join(captured.err.split())

    return call
