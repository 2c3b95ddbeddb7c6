"""Options of a compression block by block: what is refused, and what goes on, or is gone, after an interruption."""

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build
from helpers import Run
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.modeling.folders_mcsmoe import WORK
from hf_mcsmoe.streamed import journal
from hf_mcsmoe.streamed.journal import BLOCKS, RESULT, Journal

pytestmark = pytest.mark.filterwarnings("ignore:Few calibration tokens")
KEPT = "what is finished is kept; the same command goes on"
DONE = "exists and is not empty"
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
    assert DONE in err
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


def _ends_at(moment: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let a signal end a run before a step after its last block; returns the steps that begin, and that one."""
    begun = list[str]()

    def watched(name: str, step: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            if not begun and not (isinstance(given[0], Journal) and given[0].state == RESULT):
                return step(*given, **options)
            begun.append(name)
            if len(begun) == moment:
                raise SystemExit(143)
            return step(*given, **options)

        return call

    for owner, name in [(Journal, "save"), (RoutingStatistics, "save"), (Journal, "remove")]:
        patch.setattr(owner, name, watched(f"{owner.__name__} {name}", getattr(owner, name)))
    patch.setattr(journal, "shutil", SimpleNamespace(rmtree=watched("rmtree", shutil.rmtree)))
    return begun


def _moments(call: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Call a command that is ended before each step after its last block; yields the steps that it came to."""
    for moment in range(1, 100):
        with monkeypatch.context() as patch:
            begun = _ends_at(moment, patch)
            code, _, err = call()
        if code == 0:
            return
        assert code == 143, err
        yield begun


@pytest.mark.slow
@pytest.mark.parametrize("is_extended", [False, True])
def test_no_end_loses_what_was_summed(
    is_extended: bool, given: list[Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, scores, output, whole = (tmp_path / name for name in ("sums", "scores.safetensors", "out", "whole"))
    command = [*given[:6], "--stream"]
    if is_extended:  # the file is there, and what choices cost is added
        assert run("calibrate", *given[1:6], "--curves", "--output", sums)[0] == 0
        replace(RoutingStatistics.load(sums), curves={}, conditions={}).save(sums)
        shutil.copy(sums, scores)
        shutil.copy(sums, tmp_path / "whole.safetensors")
        command += ["--size", 0.6, "--bits", "8", "--reduce", "prune"]
    else:
        command += ["--experts", 0.5, "--repair", "none"]
    code, _, err = run(*command, "--output", whole, "--scores", tmp_path / "whole.safetensors")
    assert code == 0, err
    call = partial(run, *command, "--output", output, "--scores", scores)
    wanted, kinds = RoutingStatistics.load(tmp_path / "whole.safetensors"), set[str]()
    for begun in _moments(call, monkeypatch):
        kinds |= {*begun}
        code, _, err = call()
        is_done = begun[-1] == "rmtree"  # it was finished, and no more than its own files were left
        assert (code, DONE in err) == (int(is_done), is_done), err
        held = RoutingStatistics.load(scores)
        assert held.layers.keys() == wanted.layers.keys()
        for name, own in held.layers.items():
            assert own.keys() == wanted[name].keys()
            assert all(torch.equal(value, wanted[name][key]) for key, value in own.items())
        assert held.curves == wanted.curves
        assert bool(held.curves) == is_extended
        weights = [{file.name: file.read_bytes() for file in folder.glob("*.s*")} for folder in (output, whole)]
        assert weights[0] == weights[1] != {}
        shutil.rmtree(output)
        scores.unlink()
        if is_extended:
            shutil.copy(sums, scores)
    assert kinds == {"Journal save", "RoutingStatistics save", "Journal remove", "rmtree"}
