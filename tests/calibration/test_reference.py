"""The routers of a reference checkpoint: what is told of them, and that nothing else of it is read."""

import json
from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches
from hub import running_hub
from merged import run_python
from transformers import PreTrainedModel

from hf_mcsmoe import (
    MergeConfig,
    QuantizationConfig,
    RoutingStatistics,
    collect_statistics,
    compress,
    moe_layers,
    plan_merge,
    quantize_experts,
)
from hf_mcsmoe.calibration.reference import add_reference, check_reference, reference_norms
from hf_mcsmoe.layers.checkpoint import StoredTensor
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model
from hf_mcsmoe.quantization.expert_bits import IMPORTANCE

CHANGE = "router_norm_change"


def _planted(model: PreTrainedModel, folder: Path, shards: str = "10GB") -> torch.Tensor:
    """Save a model as the reference, then let its routers' rows grow or shrink; returns the changes of their norms."""
    model.save_pretrained(folder, max_shard_size=shards)
    changes = []
    for layer in moe_layers(model):
        weight = layer.router.weight.data
        before = weight.norm(dim=1)
        weight[0] *= 1.5
        weight[1] *= 0.25  # shrinks by more than any other grows
        weight[2] = -weight[2]  # moves far, and is as long as it was
        weight[3] *= 1.25
        changes.append(weight.double().norm(dim=1) - before.double())
    return torch.stack(changes)


def test_changes_of_norms_have_a_sign_and_are_not_norms_of_changes(tmp_path: Path) -> None:
    model = build("mixtral")
    changes = _planted(model, tmp_path / "base")
    statistics = collect_statistics(model, batches("mixtral", model), ["counts"])
    found = add_reference(statistics, Layers.of(model), tmp_path / "base")
    for layer, change in zip(moe_layers(model), changes, strict=True):
        told = found[layer.name][CHANGE]
        torch.testing.assert_close(told, change, rtol=1e-6, atol=1e-7)
        assert told[0] > told[3] > 0 > told[1]
        assert told[4:].abs().max() < 1e-7
        assert abs(float(told[2])) < 1e-7
    assert CHANGE not in statistics[moe_layers(model)[0].name], "what was given stays as it was"
    plan = plan_merge(model, found, MergeConfig(experts=2, reduce="prune", saliency=CHANGE, budget="uniform"))
    assert all(layer.kept == [0, 3] for layer in plan.layers.values())
    found.save(tmp_path / "scores.safetensors")
    again = RoutingStatistics.load(tmp_path / "scores.safetensors")
    assert plan_merge(model, again, MergeConfig(experts=2, reduce="prune", saliency=CHANGE, budget="uniform")) == plan
    both = found + found
    assert torch.equal(both.layers[layer.name][CHANGE], told), "of shards of the data it is the same"


@pytest.mark.parametrize("shards", ["10GB", "20kB"])
def test_only_the_routers_are_read(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    _planted(model, tmp_path, shards)
    read: list[int] = []
    whole = StoredTensor.__getitem__

    def counted(self: StoredTensor, key: object) -> torch.Tensor:
        read.append(self.empty.nbytes)
        return whole(self, key)

    monkeypatch.setattr(StoredTensor, "__getitem__", counted)
    found = reference_norms(Layers.of(empty_model(str(tmp_path))), tmp_path)
    routers = [layer.router.weight for layer in moe_layers(model)]
    assert len(found) == len(read) == len(routers) == 4
    assert sum(read) == sum(router.nbytes for router in routers)


@pytest.mark.parametrize("name", ["switch_transformers", "llama4", "longcat_flash", "muse_spark", "dbrx"])
def test_routers_of_unusual_layouts_are_found_again(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    layers = Layers.of(model)
    if layers[0].router_rows is None:
        with pytest.raises(ValueError, match="has no matrix with a row for each expert"):
            reference_norms(layers, tmp_path)
        return
    found = reference_norms(layers, tmp_path)
    for layer in layers:
        rows = model.get_parameter(layer.router_rows).detach()
        torch.testing.assert_close(found[layer.name], rows.double().norm(dim=1))


@pytest.mark.slow
def test_of_a_repository_only_its_routers_are_fetched(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    changes = _planted(model, tmp_path / "single")
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys, json\n"
        "from transformers import AutoModelForCausalLM\n"
        "from hf_mcsmoe import RoutingStatistics\n"
        "from hf_mcsmoe.calibration.reference import add_reference\n"
        "from hf_mcsmoe.layers.find import Layers\n"
        "from hf_mcsmoe.methods.view import Sums\n"
        "layers = Layers.of(AutoModelForCausalLM.from_pretrained(sys.argv[1]))\n"
        "empty = RoutingStatistics(layers.fingerprint, {name: Sums() for name in layers.names})\n"
        "for name in ('me/single', 'me/shards'):\n"
        "    found = add_reference(empty, layers, name)\n"
        "    print(json.dumps([sums['router_norm_change'].tolist() for sums in found.layers.values()]))\n"
    )
    with running_hub() as hub:
        for name in ("single", "shards"):
            hub.files[f"me/{name}"] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run_python(["-c", code, str(tmp_path / "model")], tmp_path, package=True, **environment)
    assert done.returncode == 0, done.stderr
    router = moe_layers(model)[0].router.weight.nbytes
    for line, name in zip(done.stdout.splitlines(), ("single", "shards"), strict=True):
        torch.testing.assert_close(torch.tensor(json.loads(line), dtype=torch.float64), changes)
        files = {file: content for file, content in hub.files[f"me/{name}"].items() if file.endswith(".safetensors")}
        sent = [hub.sent.get(f"/me/{name}/resolve/main/{file}", []) for file in files]
        fetched = [size for sizes in sent for size in sizes]
        assert fetched.count(router) == 4
        headers = sum(8 + int.from_bytes(content[:8], "little") for content in files.values())
        assert sum(fetched) <= 4 * router + headers, "headers and routers, and nothing else"


def test_a_reference_is_asked_for_before_any_forward(tmp_path: Path) -> None:
    model = build("mixtral")
    config = MergeConfig(experts=4, saliency=CHANGE)
    with pytest.raises(ValueError, match="name it with --base-model"):
        compress(model, [], config)
    with pytest.raises(ValueError, match="which --base-model names"):
        collect_statistics(model, batches("mixtral", model), [CHANGE])
    with pytest.raises(ValueError, match=f"{CHANGE!r} was not collected .*--base-model"):
        plan_merge(model, collect_statistics(model, batches("mixtral", model)), config)
    with pytest.raises(ValueError, match=f"read by the saliency {CHANGE!r} alone"):
        compress(model, [], MergeConfig(experts=4), base_model=tmp_path)
    with pytest.raises(ValueError, match=r"holds no config.json"):
        compress(model, [], config, base_model=tmp_path)
    build("qwen3_moe").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has no weight 'transformer\.blocks\.0\.ffn\.router"):
        compress(build("dbrx"), [], config, base_model=tmp_path / "other")
    check_reference([CHANGE], tmp_path)
    check_reference(["counts"], None)


def test_the_smaller_the_change_the_more_bits(tmp_path: Path) -> None:
    model = build("mixtral")
    _planted(model, tmp_path / "base")
    data = batches("mixtral", model)
    config = QuantizationConfig(bits=8, low_bits=2, low_share=0.75, method="nearest", importance=CHANGE)
    merged = compress(model, data, MergeConfig(experts=1.0), quantization=config, base_model=tmp_path / "base")
    for layer in moe_layers(merged):
        bits = merged.config.mcsmoe["layers"][layer.original_name]["quantized"]["down_proj"]["bits"]
        assert [expert for expert, number in enumerate(bits) if number == 8] == [1, 2], "the row that shrank the most"
    whole = compress(model, data, MergeConfig(experts=1.0))
    with pytest.raises(ValueError, match=f"{CHANGE!r} was not collected"):
        quantize_experts(whole, model, data, config)
    assert set(IMPORTANCE) == {"contribution", "frequency", CHANGE}
