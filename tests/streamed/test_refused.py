"""What cannot be streamed, or gone on with, is refused in a sentence that says what to do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches

from hf_mcsmoe import LoSparseConfig, MergeConfig, RepairConfig
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.journal import FILE, PLACE, Journal
from hf_mcsmoe.streamed.states import read_nest, write_nest

HALF = MergeConfig(experts=4)


class Killed(BaseException):
    """Ends a run as a kill does."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return source and batches of a small model."""
    folder = tmp_path_factory.mktemp("source")
    model = build("mixtral")
    model.save_pretrained(folder, max_shard_size="50KB")
    return {"source": folder, "batches": batches("mixtral", model)}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": MergeConfig(budget="measured")}, "budget='measured' tries every size"),
        ({"config": MergeConfig(experts=4, saliency="taylor")}, "after a backward pass"),
        ({"config": HALF, "low_rank": LoSparseConfig(rank=2, scope="global")}, "Ranks that compete"),
        ({"config": HALF, "stream": StreamConfig(memory=1000)}, "too small for one block: model.layers.0 takes"),
    ],
)
def test_what_needs_all_of_the_model(
    options: dict[str, Any], told: str, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        compress_folder(**given, output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def _interrupted(given: dict[str, Any], output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave a run that was killed after its first block; returns its folder."""
    saves = iter(range(2))

    def save(self: Journal) -> None:
        write(self)
        if next(saves) == 1:
            raise Killed

    write = Journal.save
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", save)
        with pytest.raises(Killed):
            compress_folder(**given, output=output, config=HALF)
    return next(output.parent.glob(".*")) / PLACE


def test_a_run_goes_on_with_the_same_only(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(given["source"], source)
    given, output = {**given, "source": source}, tmp_path / "there" / "out"
    output.parent.mkdir()
    kept = _interrupted(given, output, monkeypatch)
    with pytest.raises(ValueError, match=r"options merge experts was 4, and is 3: .*--restart"):
        compress_folder(**given, output=output, config=MergeConfig(experts=3))
    with pytest.raises(ValueError, match="options repair was null"):
        compress_folder(**given, output=output, config=HALF, repair=RepairConfig())
    with pytest.raises(ValueError, match="data was"):
        compress_folder(**{**given, "batches": given["batches"][:1]}, output=output, config=HALF)
    shard = sorted(source.glob("*.safetensors"))[0]
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=f"source {shard.name} was"):
        compress_folder(**given, output=output, config=HALF)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    journal = json.loads((kept / FILE).read_text())
    (kept / FILE).write_text(json.dumps({**journal, "version": 0}))
    with pytest.raises(ValueError, match="written by another version"):
        compress_folder(**given, output=output, config=HALF)
    (kept / FILE).write_text("{")
    with pytest.raises(ValueError, match="cut off or damaged"):
        compress_folder(**given, output=output, config=HALF)
    compress_folder(**given, output=output, config=HALF, stream=StreamConfig(restart=True))
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_source_that_changes_while_it_is_read(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(given["source"], source)

    def save(self: Journal) -> None:
        write(self)
        (source / "config.json").write_text((source / "config.json").read_text() + " ")

    write = Journal.save
    monkeypatch.setattr(Journal, "save", save)
    with pytest.raises(ValueError, match=r"config\.json of .* has changed while it was read"):
        compress_folder(source, tmp_path / "out", given["batches"], HALF)


def test_stored_outputs_come_back(tmp_path: Path) -> None:
    value = (torch.arange(5).to(torch.bfloat16), None, [torch.tensor([True, False]), torch.tensor(1.5)])
    write_nest(tmp_path / "file", value)
    for mapped in (False, True):
        first, none, (second, third) = read_nest(tmp_path / "file", mapped=mapped)
        assert torch.equal(first, value[0])
        assert none is None
        assert torch.equal(second, torch.tensor([True, False]))
        assert third == 1.5
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (first, second, third))
        first.zero_()  # which leaves the file alone
    with pytest.raises(TypeError, match="returned dict"):
        write_nest(tmp_path / "file", {})
