"""A merge from folder to folder writes what a merge in memory and `save_pretrained` write, with a layer in memory."""

import json
from pathlib import Path

import pytest
import torch
from families import build, families
from helpers import batches, logits
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, MergePlan, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.layers.shards import ShardWriter
from hf_mcsmoe.layers.source import Folder
from hf_mcsmoe.merge import merge_to_folder
from hf_mcsmoe.modeling.configuration_mcsmoe import config_class_for
from hf_mcsmoe.modeling.modeling_mcsmoe import generated_class

# Refused by `moe_layers`, or without a configuration class of its own.
REFUSED = {"doge", "nllb_moe", "qwen3_omni_moe_talker"}
KINDS = ["qwen3_moe", "gpt_oss", "switch_transformers", "dbrx", "llama4", "jetmoe", "diffusion_gemma"]
FAMILIES = [
    pytest.param(family.name, marks=() if family.name in KINDS else pytest.mark.slow)
    for family in families()
    if family.name not in REFUSED
]
INDEX = "model.safetensors.index.json"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def _texts(folder: Path) -> dict[str, str]:
    """Return the contents of all that is not weights; in the card the bytes on disk, headers included, differ."""
    files = [file for file in folder.iterdir() if file.suffix != ".safetensors" and file.name != INDEX]
    lines = {file.name: file.read_text().splitlines() for file in files if "record" not in file.name}
    return {
        name: "\n".join(line for line in text if not line.startswith("| bytes on disk"))
        for name, text in lines.items()
    }


def _saved(name: str, folder: Path) -> tuple[PreTrainedModel, MergePlan]:
    """Save a model; returns what was loaded from there, and a plan for it."""
    model = build(name)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    statistics = collect_statistics(loaded, batches(name, loaded))
    return loaded, plan_merge(loaded, statistics, MergeConfig(experts=5))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_is_that_of_a_merge_in_memory(name: str, tmp_path: Path) -> None:
    model, plan = _saved(name, tmp_path / "source")
    source, done = Folder(tmp_path / "source"), []
    merge_to_folder(source, plan, tmp_path / "a" / "merged", progress=lambda *told: done.append(told))
    merged = merge_experts(model, plan)
    merged.save_pretrained(tmp_path / "b" / "merged")
    number = sum(not item.is_whole for item in plan.layers.values())
    assert done[-1][1:] == (number, number)
    assert _texts(tmp_path / "a" / "merged") == _texts(tmp_path / "b" / "merged")
    stored = _weights(tmp_path / "a" / "merged")
    index = json.loads((tmp_path / "a" / "merged" / INDEX).read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in _weights(tmp_path / "b" / "merged").values()
    )
    loaded = generated_class(type(merged).__name__).from_pretrained(tmp_path / "a" / "merged")
    expected = merged.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    text = batches(name, model)[0]
    assert torch.equal(logits(loaded, text), logits(merged, text))
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = _saved("mixtral", tmp_path / "source")
    source, written = Folder(tmp_path / "source"), []
    write = ShardWriter.write

    def watched(self: ShardWriter, path: str, module: nn.Module) -> None:
        assert all(parameter.is_meta for parameter in source.model.parameters())
        write(self, path, module)
        assert all(parameter.is_meta for parameter in module.parameters())
        written.append(path)

    monkeypatch.setattr(ShardWriter, "write", watched)
    merge_to_folder(source, plan, tmp_path / "merged")
    assert written == [layer.name for layer in moe_layers(model)]


def test_what_fails_leaves_no_folder(tmp_path: Path) -> None:
    model, plan = _saved("mixtral", tmp_path / "source")

    def fail(name: str, done: int, of: int) -> None:
        if done == 2:
            raise KeyError(name)

    with pytest.raises(KeyError, match=r"layers\.1"):
        merge_to_folder(Folder(tmp_path / "source"), plan, tmp_path / "merged", progress=fail)
    with pytest.raises(ValueError, match="is loaded, and not a"):
        merge_to_folder(moe_layers(model), plan, tmp_path / "merged")
    build("mixtral", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="made for another model"):
        merge_to_folder(Folder(tmp_path / "other"), plan, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


def test_a_writer_says_what_is_wrong(tmp_path: Path) -> None:
    model, plan = _saved("mixtral", tmp_path / "source")
    merged = merge_experts(model, plan)
    source = Folder(tmp_path / "source")
    writer = ShardWriter(tmp_path, source)
    writer.write("model.layers.0.mlp.other", nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.other\.bias was written"):
        writer.write_rest(merged)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj .* was not written"):
        ShardWriter(tmp_path, source).write_rest(merged.to("meta"))


def test_config_classes_of_the_families_left_out() -> None:
    for name in REFUSED - {"qwen3_omni_moe_talker"}:
        with pytest.raises(ValueError, match="cannot be merged"):
            moe_layers(build(name))
    with pytest.raises(ValueError, match="knows no model type"):
        config_class_for(build("qwen3_omni_moe_talker").config.model_type)
