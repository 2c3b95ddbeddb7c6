"""Commands that a launcher starts twice: one result, told once."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import write_models
from helpers import Run
from pair import in_two_processes
from safetensors.torch import load_file

from hf_mcsmoe import cli
from hf_mcsmoe.files import read_json
from hf_mcsmoe.streamed.journal import Journal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model and text."""
    return write_models(tmp_path_factory.mktemp("processes"))


def _in_two(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: Any) -> list[tuple[int, str, str]]:
    """Return exit code, standard output and error of both processes."""
    monkeypatch.setattr("sys.argv", ["hf-mcsmoe", *map(str, arguments)])

    def work(rank: int) -> tuple[int, str, str]:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                cli.main()
            except SystemExit as ended:
                return int(ended.code or 0), out.getvalue(), " ".join(errors.getvalue().split())
        raise AssertionError("a command ends with SystemExit")

    return [(code, out, errors) for code, out, errors in in_two_processes(work, folder)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Few calibration tokens", "ignore:The repair left")
def test_compress_shares_its_work(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [folder / "mixtral", "--data", folder / "text.txt", "--num-samples", 6, "--batch-size", 1, "--experts", 4]
    written = [
        ["--scores", folder / f"{number}.safetensors", "--output", folder / f"out{number}"] for number in (1, 2)
    ]
    code, _, errors = run("compress", *given, *written[0])
    assert code == 0, errors
    first, second = _in_two(monkeypatch, folder, "compress", *given, *written[1])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "written after" in first[1]
    assert second[1:] == ("", "")
    found = [folder / f"out{number}" for number in (1, 2)]
    assert read_json(found[0] / "mcsmoe_plan.json", "") == read_json(found[1] / "mcsmoe_plan.json", "")
    weights = [load_file(path / "model.safetensors") for path in found]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[1][name].equal(value) for name, value in weights[0].items())
    sums = [load_file(folder / f"{number}.safetensors") for number in (1, 2)]
    assert sums[0].keys() == sums[1].keys()
    for name, value in sums[0].items():
        assert (sums[1][name].double() - value.double()).norm() <= 1e-12 * value.double().norm()
    assert not list(folder.glob(".*mcsmoe-work*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Few calibration tokens", "ignore:The repair left")
@pytest.mark.parametrize(
    "way",
    [
        ["--experts", 4, "--repair", "refit"],
        ["--size", 0.7, "--reduce", "prune"],
        ["--saliency", "taylor", "--experts", 0.5],
    ],
)
def test_compress_block_by_block_shares_the_first_sweep(
    way: list[Any], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [folder / "mixtral", "--data", folder / "text.txt", "--num-samples", 6, "--batch-size", 1, "--stream"]
    given += [*way, "--overwrite"]
    output, scores = folder / "streamed", folder / f"streamed{way[0]}.safetensors"
    first, second = _in_two(monkeypatch, folder, "compress", *given, "--output", output, "--scores", scores)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")
    code, _, errors = run("compress", *given, "--output", folder / "alone")
    assert code == 0, errors
    found = [
        {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
        for path in (output, folder / "alone")
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value)
    assert scores.is_file()
    assert not list(folder.glob(".*mcsmoe-work*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_a_run_block_by_block_of_which_one_process_ends_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [folder / "mixtral", "--data", folder / "text.txt", "--num-samples", 6, "--experts", 4, "--stream"]
    given += ["--repair", "none", "--output", folder / "ended"]

    remove = Journal.remove

    def ends(self: Journal) -> None:
        if "rank-" not in str(self.folder):
            raise OSError("the disk of this process is gone")
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", ends)  # of the first, when all is written
        first, second = _in_two(monkeypatch, folder, "compress", *given)
    assert first[0] == second[0] == 1
    assert "the disk of this process is gone" in first[2]
    first, second = _in_two(monkeypatch, folder, "compress", *given)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert not list(folder.glob(".*mcsmoe-work*"))


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--stream", "--overwrite"]])
def test_calibrate_writes_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]) -> None:
    given = [folder / "mixtral", "--data", folder / "text.txt", "--num-samples", 6, "--output", folder / "scores"]
    first, second = _in_two(monkeypatch, folder, "calibrate", *given, *way)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "holds" in first[1]
    assert second[1] == ""
    again, _ = _in_two(monkeypatch, folder, "calibrate", *given)
    assert "holds all of it already" in again[2]


@pytest.mark.slow
def test_a_mistake_is_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [folder / "mixtral", "--data", folder / "text.txt", "--experts", 40, "--output", folder / "no"]
    found = _in_two(monkeypatch, folder, "compress", *given)
    assert [code for code, _, _ in found] == [1, 1]
    assert sum(errors.count("experts=40 is more than") for _, _, errors in found) == 1
    assert not (folder / "no").exists()


def test_other_commands_work_in_one_process(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    code, _, errors = run("inspect", folder / "mixtral")
    assert code == 1
    assert "hf-mcsmoe inspect works in one process, and 2 were started" in errors
