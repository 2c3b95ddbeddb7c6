"""Routers of merged layers that are left with one row for each group: their rows, and checkpoints of the family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits
from layouts import LAYOUTS
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from hf_mcsmoe import (
    MergeConfig,
    MergePlan,
    RepairConfig,
    collect_statistics,
    compress,
    merge_experts,
    moe_layers,
    plan_merge,
)
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.merge import merge_to_folder

FAMILIES = ["mixtral", "gpt_oss", "ernie4_5_moe"]  # rows; rows and biases; rows and a correction in the router


def _rows(layer: Any) -> dict[str, torch.Tensor]:
    tensors = [*layer.router.named_parameters(), *layer.router.named_buffers()]
    return {name: value.detach().squeeze(0) if value.shape[0] == 1 else value.detach() for name, value in tensors}


@pytest.mark.parametrize("router", ["dominant", "mean", "weighted"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_has_the_rows_of_its_groups(name: str, router: str) -> None:
    model = build(name)
    data = batches(name, model)
    config = MergeConfig(experts=5, budget="uniform", router=router)
    statistics = collect_statistics(model, data, config.needs)
    plan = plan_merge(model, statistics, config)
    whole = merge_experts(model, plan_merge(model, statistics, MergeConfig(experts=5, budget="uniform")))
    cut = merge_experts(model, plan)
    assert logits(cut, data[0]).isfinite().all()
    for old, new, other in zip(moe_layers(model), moe_layers(cut), moe_layers(whole), strict=True):
        item = plan.layers[old.name]
        assert new.kept == tuple(item.dominant)
        for ours, theirs in zip(new.container.parameters(), other.container.parameters(), strict=True):
            assert torch.equal(ours, theirs), "experts are merged as where the router keeps its rows"
        for key, rows in _rows(old).items():
            for group, dominant in enumerate(item.dominant):
                members = item.members(group)
                weights = [float(item.weights[m]) if router == "weighted" else 1 / len(members) for m in members]
                mean = sum(weight * rows[member] for weight, member in zip(weights, members, strict=True))
                expected = rows[dominant] if router == "dominant" else mean
                torch.testing.assert_close(_rows(new)[key][group], expected, rtol=1e-6, atol=1e-7)


def test_one_count_of_experts_is_a_checkpoint_of_the_family(tmp_path: Path) -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    config = MergeConfig(experts=4, budget="uniform", router="mean")
    result = compress(model, data, config)
    result.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(loaded) is MixtralForCausalLM
    assert loaded.config.num_local_experts == 4
    assert torch.equal(logits(loaded, data[0]), logits(result, data[0]))
    plan = MergePlan.load(tmp_path / "plain" / "mcsmoe_plan.json")
    assert plan.layers == plan_merge(model, collect_statistics(model, data, config.needs), config).layers
    assert -1 not in plan.layers["model.layers.0.mlp.experts"].expert_map


def test_a_folder_is_merged_like_a_loaded_model(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "source")
    data = batches("mixtral", model)
    config = MergeConfig(experts=0.5, router="weighted")
    statistics = collect_statistics(model, data, config.needs)
    plan = plan_merge(model, statistics, config)
    merge_to_folder(Folder(tmp_path / "source"), plan, tmp_path / "out", statistics=statistics)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(loaded, data[0]), logits(merge_experts(model, plan, consume=True), data[0]))


REFUSED = [
    ("mixtral", {"router": "men"}, "none", "Unknown router 'men'. Did you mean 'mean'?"),
    ("mixtral", {"router": "mean"}, "refit", "router='mean' gives routers new rows, and repair='refit' knows"),
    ("mixtral", {"router": "mean", "budget": "measured"}, "none", "and budget='measured' knows"),
    ("mixtral", {"router": "dominant", "experts": 1}, "none", "less than the 2 experts a layer that the routers need"),
    ("deepseek_v3", {"router": "dominant", "experts": 4}, "none", "pick among 2 groups of their own"),
]


@pytest.mark.parametrize(("name", "options", "repair", "said"), REFUSED)
def test_rows_that_cannot_be_had_are_refused_before_any_forward(
    name: str, options: dict[str, Any], repair: str, said: str
) -> None:
    model = build(name)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        compress(model, batches(name, model), MergeConfig(**options), repair=RepairConfig(method=repair))


@pytest.mark.filterwarnings("ignore:The repair left")
def test_rows_of_dominant_experts_go_with_a_repair() -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=3)
    config = MergeConfig(experts=4, router="dominant")
    repaired = compress(model, data, config, repair=RepairConfig(method="joint"))
    assert not torch.equal(logits(repaired, data[0]), logits(compress(model, data, config), data[0]))
    assert LAYOUTS["mixtral"].before(moe_layers(repaired)[0].container, 3)["down"].isfinite().all()
