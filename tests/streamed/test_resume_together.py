"""Several processes share a first sweep, and after a kill each goes on from the blocks that it has finished itself."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import batches
from pair import in_two_processes
from safetensors.torch import load_file

import hf_mcsmoe as mc
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import Saving, StreamConfig, held_bytes
from hf_mcsmoe.streamed.journal import FILE, PARTS, Journal

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Few calibration tokens")]


def _source(name: str, folder: Path) -> dict[str, Any]:
    """Save a model; returns the arguments of `compress_folder` but for output and what is saved."""
    model = build(name)
    model.save_pretrained(folder)
    rows = batches(name, model, 5, batch_size=4)
    return {"source": folder, "batches": rows, "config": mc.MergeConfig(experts=4)}


def _shared(given: dict[str, Any], folder: Path, killed: tuple[int, int] | None = None) -> list[Any]:
    """Compress in two processes, one of which may be killed right after a save of its own part.

    Returns of each what it was told, "" where all went well, and how often it saved its part; None of the killed one.
    """

    def work(rank: int) -> list[Any]:
        saves, write = [0], Journal.save

        def save(self: Journal) -> None:
            write(self)
            saves[0] += "rank-" in str(self.folder)
            if killed == (rank, saves[0]):
                os._exit(9)

        Journal.save = save
        try:
            with mc.together(patience=60):
                saving = Saving(scores=folder / "scores.safetensors")
                compress_folder(**given, output=folder / "out", saving=saving)
        except RuntimeError as error:
            return [str(error), saves[0]]
        return ["", saves[0]]

    folder.mkdir(exist_ok=True)
    return in_two_processes(work, folder)


def _made(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the sums as lists, and the bytes of the weights."""
    sums = {key: value.tolist() for key, value in load_file(folder / "scores.safetensors").items()}
    return sums, {file.name: file.read_bytes() for file in (folder / "out").glob("*.safetensors")}


@pytest.mark.parametrize(("name", "mapped"), [("mixtral", False), ("mixtral", True), ("switch_transformers", False)])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_goes_on_from_what_it_has_finished(name: str, mapped: bool, rank: int, tmp_path: Path) -> None:
    given = _source(name, tmp_path / "source")
    assert [told for told, _ in _shared(given, tmp_path / "whole")] == ["", ""]
    if mapped:  # no byte is left for hidden states
        given["stream"] = StreamConfig(memory=held_bytes(Folder(tmp_path / "source").model))
    number, folder = len(blocks(build(name))), tmp_path / "parts"
    found = _shared(given, folder, (rank, 2))  # one block is finished
    assert found[rank] is None
    assert "ended without a word" in found[1 - rank][0]
    assert found[1 - rank][1] == 1 + number, "the other finished its share"
    found = _shared(given, folder, (rank, 1))
    assert found[rank] is None
    again = _shared(given, folder)
    assert [told for told, _ in again] == ["", ""]
    assert again[rank][1] == number - 2
    assert again[1 - rank][1] == 0
    assert _made(folder) == _made(tmp_path / "whole")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("lost", ["folder", "journal", "run"])
def test_a_part_that_is_lost_or_of_another_run_is_begun_anew(lost: str, tmp_path: Path) -> None:
    given = _source("mixtral", tmp_path / "source")
    _shared(given, tmp_path / "whole")
    folder, number = tmp_path / "parts", len(blocks(build("mixtral")))
    _shared(given, folder, (1, 3))
    part = next(folder.glob(f".out*/streamed/{PARTS.replace('*', '1-*', 1)}/streamed"))
    content = json.loads((part / FILE).read_text())
    if lost == "folder":
        shutil.rmtree(part.parent)
    elif lost == "journal":
        (part / FILE).write_text("{")
    else:
        content["run"]["data"][0] = "of other rows"
        (part / FILE).write_text(json.dumps(content))
    again = _shared(given, folder)
    assert [told for told, _ in again] == ["", ""]
    assert [saves for _, saves in again] == [0, 1 + number]
    assert _made(folder) == _made(tmp_path / "whole")


def test_another_number_of_processes_begins_the_sweep_anew(tmp_path: Path) -> None:
    given, scores = _source("mixtral", tmp_path / "source"), tmp_path / "parts" / "scores.safetensors"
    (tmp_path / "alone").mkdir()
    alone = Saving(scores=tmp_path / "alone" / "scores.safetensors")
    compress_folder(**given, output=tmp_path / "alone" / "out", saving=alone)
    _shared(given, tmp_path / "parts", (1, 3))
    with pytest.warns(UserWarning, match="begun by 2 processes and begins anew with 1"):
        compress_folder(**given, output=tmp_path / "parts" / "out", saving=Saving(scores=scores))
    assert _made(tmp_path / "parts") == _made(tmp_path / "alone")
    assert not list((tmp_path / "parts").glob(".*"))


def test_other_data_are_refused(tmp_path: Path) -> None:
    given = _source("mixtral", tmp_path / "source")
    _shared(given, tmp_path / "parts", (1, 3))
    with pytest.raises(AssertionError, match=r"data was .*--restart"):
        _shared({**given, "batches": given["batches"][:3]}, tmp_path / "parts")
