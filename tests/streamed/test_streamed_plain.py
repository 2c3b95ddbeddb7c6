"""A plain checkpoint made in the run that reads block by block is that of two commands, and of the way in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from safetensors.torch import load_file

from hf_mcsmoe import MergeConfig, QuantizationConfig, RepairConfig, compress, compress_folder
from hf_mcsmoe.export.checkpoint import export
from hf_mcsmoe.export.expected import Plain
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.record import Record
from hf_mcsmoe.streamed.config import Saving
from hf_mcsmoe.streamed.journal import RESULT, Journal

pytestmark = pytest.mark.filterwarnings("ignore:The repair left")
MERGED = MergeConfig(experts=4, budget="uniform", plain=True)
PRUNED = MergeConfig(experts=4, budget="uniform", reduce="prune", plain=True)
BITS = QuantizationConfig(bits=4, group_size=8)


class Killed(BaseException):
    """Ends a run as a kill does."""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def documents(folder: Path) -> dict[str, Any]:
    """Return the lines of all files of text in some order, but for those of bytes on disk."""
    texts = [file for file in folder.iterdir() if file.suffix != ".safetensors" and "index" not in file.name]
    lines = {file.name: sorted(line.rstrip(",") for line in file.read_text().splitlines()) for file in texts}
    return {name: [x for x in own if "on disk" not in x and "on_disk" not in x] for name, own in lines.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


CASES: list[Any] = [
    ("mixtral", MERGED, {}, {}),
    pytest.param("mixtral", PRUNED, {"repair": RepairConfig()}, {}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", MERGED, {"repair": RepairConfig(), "quantization": BITS}, {}, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", replace(MERGED, experts=6), {"repair": RepairConfig()}, {}, marks=pytest.mark.slow),
    pytest.param("mixtral", MERGED, {}, {"expand": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "config", "options", "form"), CASES)
def test_a_plain_checkpoint_in_one_run(
    name: str, config: MergeConfig, options: dict[str, Any], form: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    rows = batches(name, model)

    saving = Saving(plain=Plain(**form))
    record = compress_folder(tmp_path / "source", tmp_path / "a" / "out", rows, config, **options, saving=saving)
    assert record.is_plain
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    one = tmp_path / "a" / "out"
    if config.reduce != "prune":  # of which the first command makes a plain checkpoint by itself
        compress_folder(tmp_path / "source", tmp_path / "b" / "out", rows, config, **options)
        export(tmp_path / "b" / "out", tmp_path / "c" / "out", **form)
        assert contents(one) == contents(tmp_path / "c" / "out")
    loaded = type(model).from_pretrained(tmp_path / "source")
    export(compress(loaded, rows, config, **options), tmp_path / "d" / "out", **form)
    expected, found = weights(tmp_path / "d" / "out"), weights(one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert documents(one) == documents(tmp_path / "d" / "out")


@pytest.mark.slow
def test_a_run_that_was_killed_while_the_form_was_made_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ends = build("mixtral"), iter([True, True])
    model.save_pretrained(tmp_path / "source")
    given: dict[str, Any] = {"source": tmp_path / "source", "batches": batches("mixtral", model), "config": MERGED}
    given["saving"] = Saving(plain=Plain())

    def exported(ours: Folder, output: Path, **options: Any) -> Record:
        assert list(Path(ours.model.name_or_path).glob("*.safetensors"))
        record = export(ours, output, **options)
        if next(ends, False):
            raise Killed
        return record

    compress_folder(output=tmp_path / "whole" / "out", **given)
    monkeypatch.setattr("hf_mcsmoe.streamed.compress.export", exported)
    for _ in range(2):
        with pytest.raises(Killed):
            compress_folder(output=tmp_path / "parts" / "out", **given)
    states, save = list[str](), Journal.save

    def watched(self: Journal) -> None:
        states.append(self.state)
        save(self)

    monkeypatch.setattr(Journal, "save", watched)
    compress_folder(output=tmp_path / "parts" / "out", **given)
    assert set(states) == {RESULT}
    assert contents(tmp_path / "parts" / "out") == contents(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["out"]


def test_a_result_that_turns_out_to_have_no_plain_form_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    given: dict[str, Any] = {"source": tmp_path / "source", "batches": batches("mixtral", model), "config": PRUNED}
    compress_folder(output=tmp_path / "ours" / "out", **{**given, "config": MERGED})

    def refused(*arguments: Any, **options: Any) -> Record:
        raise ValueError("There is no such form.")

    monkeypatch.setattr("hf_mcsmoe.streamed.compress.export", refused)
    for name, config in (("a", PRUNED), ("b", MERGED)):
        place = tmp_path / name / "out"
        with pytest.raises(ValueError, match=rf"no such form\. .*lies in {place} in our own format"):
            compress_folder(output=place, **{**given, "config": config}, saving=Saving(plain=Plain()))
        assert [path.name for path in place.parent.iterdir()] == ["out"]
        found = Layers.of(Folder(place))
        assert {layer.num_experts for layer in found} == {4}
        assert found.compressed
    assert contents(tmp_path / "b" / "out") == contents(tmp_path / "ours" / "out")
