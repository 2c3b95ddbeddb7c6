"""The best subset of a layer's experts against pruned models of every subset."""

import itertools
from typing import Any

import pytest
import torch
from families import build
from helpers import Batch, batches
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, MergePlan, collect_statistics, compress, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.subsets import check_subsets
from hf_mcsmoe.plan import LayerPlan
from hf_mcsmoe.planning import check_request

# Softmax over the picks; over all, not renormalised.
FAMILIES = ["mixtral", "olmoe"]


def _first_outputs(model: PreTrainedModel, data: list[Batch]) -> torch.Tensor:
    """Return what the first layer puts out for the tokens that count, which come to it as in the original."""
    layer, seen = moe_layers(model)[0], []

    def hook(module: Any, arguments: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    handle = layer.block.register_forward_hook(hook)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat([rows[batch["attention_mask"].flatten().bool()] for rows, batch in zip(seen, data, strict=True)])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_of_all_subsets_is_found(name: str) -> None:
    model = build(name)
    data = batches(name, model)
    config = MergeConfig(experts=7, budget="uniform", reduce="prune", selection="exhaustive")
    statistics = collect_statistics(model, data, config.needs)
    plan = plan_merge(model, statistics, config)
    first, expected = moe_layers(model)[0].name, _first_outputs(model, data)
    errors = {}
    for kept in itertools.combinations(range(8), 7):
        alone = MergePlan({first: LayerPlan.pruned(8, list(kept))}, plan.provenance)
        missed = _first_outputs(merge_experts(model, alone), data) - expected
        errors[kept] = float(missed.square().sum())
    best = min(errors, key=lambda kept: errors[kept])
    assert plan.layers[first].kept == list(best)
    assert sorted(errors.values())[1] > 1.001 * errors[best], "or the test would not tell"


def test_too_many_subsets_are_refused_before_any_forward() -> None:
    with pytest.raises(
        ValueError, match="would try 1832624140942590534 subsets of 32 of 64 experts, and tries 100000"
    ):
        check_subsets(64, 32)
    with pytest.raises(ValueError, match="does not know routers that pick among 2 groups of experts"):
        check_subsets(8, 4, groups=2)
    check_subsets(16, 8)
    model = build("deepseek_v3")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    config = MergeConfig(experts=6, reduce="prune", selection="exhaustive", budget="uniform")
    with pytest.raises(ValueError, match="does not know routers that pick among 2 groups of experts"):
        compress(model, batches("deepseek_v3", model), config)


def test_weights_that_follow_from_no_rule_are_refused() -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    config = MergeConfig(experts=7, reduce="prune", selection="exhaustive", budget="uniform")
    statistics = collect_statistics(model, data, config.needs)
    table = next(iter(statistics.layers.values()))["sample"]
    table[:, -3:-2] = table[:, -3:-2].square()  # a weight of each token
    with pytest.raises(ValueError, match="follow from no rule that is known: choose selection='salient'"):
        plan_merge(model, statistics, config)


def test_routers_that_scale_inputs_are_refused_before_any_forward() -> None:
    config = MergeConfig(reduce="prune", selection="exhaustive", budget="uniform")
    with pytest.raises(ValueError, match="does not know routers that scale inputs"):
        check_request(Layers.of(build("llama4_text")), config)
