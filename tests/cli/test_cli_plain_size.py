"""`compress --size --plain`: what is chosen for a size is what a plain checkpoint and the engines named can hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run
from merged import tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder

TEXT = "\n\n".join(" ".join(f"w{48 + (5 * i + j) % 80}" for j in range(24)) for i in range(48))
# Family, options, and in how many bits experts may be stored, and whether layers may differ.
CASES: list[tuple[str, list[Any], set[int | None], bool]] = [
    ("mixtral", ["--size", 0.6], {None, 8, 4, 3, 2}, False),
    ("mixtral", ["--size", 0.3, "--for", "vllm"], {None, 8, 4}, True),
    ("mixtral", ["--size", 0.7, "--for", "mlx"], {None}, False),
    ("mixtral", ["--size", 0.5, "--expand", "--stream"], {None, 8, 4, 3, 2}, False),
    ("mixtral", ["--size", 0.5, "--for", "vllm,llama.cpp", "--stream"], {None, 8, 4}, False),
    ("deepseek_v3", ["--size", 0.6, "--for", "vllm"], {None, 8, 4}, True),
    ("gpt_oss", ["--size", 0.7], {None}, False),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left", "ignore:The calibration", "ignore:.*calibration tokens")
@pytest.mark.parametrize(("name", "options", "bits", "may_differ"), CASES)
def test_a_search_ends_with_a_checkpoint_of_the_family(
    name: str, options: list[Any], bits: set[int | None], may_differ: bool, tmp_path: Path, run: Run
) -> None:
    build(name).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    place = tmp_path / "plain"
    given = ["--data", tmp_path / "text.txt", "--plain", "--group-size", 8, "--output", place, *options]
    code, _, err = run("compress", tmp_path / "base", *given)
    assert code == 0, err
    assert "chosen for the size among what" in " ".join(err.split())
    record = json.loads((place / "mcsmoe_record.json").read_text())
    assert record["is_plain"]
    layers = list(record["layers"].values())
    if "--expand" not in options:
        assert len({layer["after"] for layer in layers}) == 1, "one number of experts"
    found = [set(layer.get("bits", {}).values()) or {None} for layer in layers]
    assert all(len(own) == 1 for own in found), "all matrices of a layer alike"
    assert set.union(*found) <= bits
    assert may_differ or len(set.union(*found)) == 1
    config = json.loads((place / "config.json").read_text())
    groups = config.get("quantization_config", {}).get("config_groups", {})
    assert all(group["weights"]["symmetric"] for group in groups.values())
    assert not list(place.glob("*.py"))
    _, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, trust_remote_code=False)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = [value for file in place.glob("*.safetensors") for value in load_file(file).values()]
    assert all(torch.isfinite(value).all() for value in weights if value.is_floating_point())


@pytest.mark.filterwarnings("ignore:The repair left", "ignore:The calibration", "ignore:.*calibration tokens")
def test_a_result_in_memory_that_turns_out_to_have_no_plain_form_is_kept(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)

    def refused(*arguments: Any, **options: Any) -> None:
        raise ValueError("There is no such form.")

    monkeypatch.setattr("hf_mcsmoe.cli.plain.export", refused)
    given = ["--data", tmp_path / "text.txt", "--plain", "--experts", 4, "--repair", "none", "--no-stream"]
    code, _, err = run("compress", tmp_path / "base", *given, "--output", tmp_path / "out")
    assert code == 1
    assert "There is no such form. So the result is no plain checkpoint: it lies in" in " ".join(err.split())
    assert {layer.num_experts for layer in Layers.of(Folder(tmp_path / "out"))} == {4}
