"""`budget="measured"`: counts by what fewer experts of each layer cost."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from merged import stored_experts
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, RepairConfig, collect_statistics, compress, merge_experts, plan_merge
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.calibration.inputs import held_out_sequences
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.search.budget import measured_plan
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig

CONFIG = MergeConfig(experts=0.5, budget="measured")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen3_moe")


@pytest.mark.parametrize("reduce", ["merge", "prune", "auto"])
def test_counts_are_those_of_least_effect(
    model: PreTrainedModel, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, data, config = Layers.of(model), batches("qwen3_moe", model), replace(CONFIG, reduce=reduce)
    size, top_k = layers[0].num_experts, layers[0].top_k or 1
    effects = [{count: (size - count) ** power * 0.01 for count in range(1, size)} for power in (1.0, 2.5, 1.5, 3.0)]
    effects = effects[: len(layers)]
    # Pruning costs another share of what merging does in each layer, and with "auto" each may take the cheaper.
    shares = {"merge": [1.0] * 4, "prune": [0.3, 1.7, 0.6, 2.0]}
    kinds = ["merge", "prune"] if reduce == "auto" else [reduce]

    def reduced(place: int, kind: str) -> dict[int, Part]:
        found = {count: effect * shares[kind][place] for count, effect in effects[place].items()}
        return {count: Part(effect, effect) for count, effect in found.items()}

    curves = {
        layer.name: LayerCurves(size, {kind: reduced(place, kind) for kind in kinds})
        for place, layer in enumerate(layers)
    }
    least = [min(shares[kind][place] for kind in kinds) for place in range(len(layers))]
    effects = [{count: effect * low for count, effect in own.items()} for own, low in zip(effects, least, strict=True)]
    monkeypatch.setattr("hf_mcsmoe.search.budget.measure_curves", lambda *a, **k: curves)
    monkeypatch.setattr("hf_mcsmoe.search.budget.OTHERS", ())
    plan = measured_plan(layers, collect_statistics(layers, data, config.resolved().needs), data, config)
    total = size * len(layers) // 2
    every = itertools.product(*[[*own, size] for own in effects])
    fitting = [counts for counts in every if sum(counts) <= total and min(counts) >= top_k]
    costs = {
        counts: sum(own.get(count, 0.0) for own, count in zip(effects, counts, strict=True)) for counts in fitting
    }
    found = tuple(len(item.dominant) for item in plan.layers.values())
    assert costs[found] == pytest.approx(min(costs.values()))
    assert (plan.config["budget"], plan.config["reduce"], plan.config["experts"]) == ("measured", reduce, 0.5)
    if reduce == "auto":
        items = list(plan.layers.values())
        kinds = ["merge" if item.kept is None else "prune" for item in items]
        assert [kind for kind, item in zip(kinds, items, strict=True) if not item.is_whole] == [
            "merge" if low == 1 else "prune" for low, item in zip(least, items, strict=True) if not item.is_whole
        ]


@torch.no_grad()
def _divergence(original: PreTrainedModel, student: PreTrainedModel, rows: torch.Tensor) -> float:
    """Return the mean over predicted tokens of `sum p (log p - log q)`."""
    ours, theirs = (model(input_ids=rows).logits[:, :-1].double().log_softmax(-1) for model in (student, original))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_budget_that_does_worse_than_an_even_one_is_not_taken(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, config = Layers.of(model), replace(CONFIG, min_experts=2)
    size = layers[0].num_experts
    data = [{"input_ids": batch["input_ids"]} for batch in batches("qwen3_moe", model)]
    statistics = collect_statistics(layers, data, config.resolved().needs)
    # The curves say, wrongly, that the first layer can do without nearly all of its experts.
    curves = {
        layer.name: LayerCurves(size, {"merge": {count: Part(cost, cost) for count in range(1, size)}})
        for layer, cost in zip(layers, (1e-9, 1.0, 1.0, 1.0), strict=False)
    }
    monkeypatch.setattr("hf_mcsmoe.search.budget.measure_curves", lambda *a, **k: curves)
    plan = measured_plan(layers, statistics, data, config)
    rows = torch.cat([batch["input_ids"] for batch in data])
    judges = rows[held_out_sequences(len(rows))]
    plans = {name: plan_merge(model, statistics, replace(config, budget=name)) for name in ("uniform", "adaptive")}
    for name, other in plans.items():
        expected = _divergence(model, merge_experts(model, other), judges)
        assert plan.provenance["budgets"][name] == pytest.approx(expected, rel=1e-4)
    best = min(plan.provenance["budgets"], key=plan.provenance["budgets"].get)
    assert best != "measured"
    assert plan.layers == plans[best].layers
    assert plan.config["budget"] == "measured"


@pytest.mark.slow
def test_the_counts_are_measured_on_the_way_and_the_plan_can_be_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    data = batches("qwen3_moe", model)
    result = compress(model, iter(data), CONFIG)
    assert sum(stored_experts(result)) == Layers.of(model)[0].num_experts * len(Layers.of(model)) // 2
    file = tmp_path / "plan.json"
    plan = record_of(result).plan
    assert plan["config"]["budget"] == "measured"
    measured_plan(Layers.of(model), collect_statistics(model, data), data, CONFIG).save(file)
    assert {name: len(item.dominant) for name, item in MergePlan.load(file).layers.items()} == {
        name: len(item["dominant"]) for name, item in plan["layers"].items()
    }


def test_what_cannot_be_is_told_before_anything_is_measured(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_mcsmoe.search.budget.measure_curves", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"experts=1 is \d+ experts in all, and the \d+ layers need at least"):
        compress(model, batches("qwen3_moe", model), replace(CONFIG, experts=1))


@pytest.mark.parametrize(
    ("reduce", "other"),
    [("prune", {"selection": "exhaustive"}), ("merge", {"capacity": 4}), ("merge", {"router": "mean"})],
)
def test_curves_are_of_the_options_that_they_were_measured_with(reduce: str, other: dict[str, Any]) -> None:
    told = [conditions(MergeConfig(reduce=reduce, **more), SizeConfig(reduce=reduce), JOINT) for more in ({}, other)]
    assert told[0] != told[1]


def test_what_is_left_to_the_measured_effect_needs_the_measured_budget() -> None:
    with pytest.raises(ValueError, match="choose budget='measured' or a size with it, or 'merge' or 'prune'"):
        MergeConfig(reduce="auto")


@pytest.mark.slow
def test_a_router_whose_picks_cannot_be_told_is_named() -> None:
    model = build("muse_spark")
    with pytest.raises(ValueError, match="router"):
        compress(model, batches("muse_spark", model), replace(CONFIG, reduce="prune"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_experts_with_a_norm_behind_them_are_compared_as_they_can_be_fitted() -> None:
    model = build("muse_spark")
    repair = RepairConfig(method="local", steps=2)
    result = compress(model, batches("muse_spark", model), replace(CONFIG, reduce="auto"), repair=repair)
    assert len(record_of(result).plan["budgets"]) > 1
    assert sum(stored_experts(result)) == sum(layer.num_experts for layer in Layers.of(model)) // 2


def test_statistics_alone_do_not_measure(model: PreTrainedModel) -> None:
    statistics = collect_statistics(model, batches("qwen3_moe", model))
    with pytest.raises(ValueError, match="which `compress` does"):
        plan_merge(model, statistics, CONFIG)
