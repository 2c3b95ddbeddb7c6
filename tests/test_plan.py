"""Plans: equal to the method written a second time, readable, and refused where they cannot be met."""

import copy
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from families import build, inputs
from helpers import batches, groups_of
from transformers import PreTrainedModel

from hf_mcsmoe import (
    MergeConfig,
    MergePlan,
    RoutingStatistics,
    collect_statistics,
    compress,
    merge_experts,
    moe_layers,
    plan_merge,
)
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.plan import LayerPlan


@functools.cache
def _model(name: str = "mixtral") -> PreTrainedModel:
    return build(name)


@functools.cache
def _statistics(name: str = "mixtral") -> RoutingStatistics:
    return collect_statistics(_model(name), batches(name, _model(name)))


def _plan(name: str = "mixtral", **options: Any) -> MergePlan:
    return plan_merge(_model(name), _statistics(name), MergeConfig(**options))


@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
@pytest.mark.parametrize("name", oracle.FAMILIES)
def test_a_plan_equals_the_oracle(name: str, budget: str) -> None:
    keep = [real for batch in batches(name, _model(name)) for real in batch["attention_mask"].flatten()]
    seen = oracle.observe(_model(name), oracle.FAMILIES[name], batches(name, _model(name)))
    decoder = [layer for layer in seen if "decoder" in layer]
    sums = {layer: oracle.sums(tokens, None if layer in decoder else keep) for layer, tokens in seen.items()}
    # A share of each layer's own tokens: the encoder of Switch sees fewer than its decoder.
    counts = [layer.counts for layer in sums.values()]
    kept = oracle.budget(counts, 3 * len(counts)) if budget == "adaptive" else [3] * len(counts)
    plan = _plan(name, experts=3, budget=budget)
    assert list(plan.layers) == [layer.name for layer in moe_layers(_model(name))]
    for (layer, expected), number in zip(sums.items(), kept, strict=True):
        expert_map, dominant = oracle.group(expected, number)
        found = plan.layers[layer]
        assert (found.expert_map, found.dominant) == (expert_map, dominant)
        for expert, weight in enumerate(found.weights):
            group = [member for member in range(8) if expert_map[member] == expert_map[expert]]
            total = sum(expected.counts[member] for member in group)
            share = expected.counts[expert] / total if total else 1 / len(group)
            assert weight == pytest.approx(share, rel=1e-12)
        nearest = [expected.cosine(expert, dominant[expert_map[expert]]) for expert in range(8)]
        assert found.similarity == pytest.approx(nearest, abs=1e-4)
        assert found.counts == expected.counts


def test_a_plan_shows_what_is_known_and_finite(tmp_path: Path) -> None:
    def forbidding(view: LayerView) -> torch.Tensor:
        return torch.full((8, 8), -torch.inf).fill_diagonal_(1.0)

    statistics = collect_statistics(_model(), batches("mixtral", _model()), ["tokens"])
    config = MergeConfig(
        experts=7,
        budget="uniform",
        saliency=lambda view: -torch.arange(8.0),
        similarity=forbidding,
        weighting="uniform",
    )
    plan = plan_merge(_model(), statistics, config)
    for layer in plan.layers.values():
        assert layer.similarity == [1.0] * 7 + [None]
        assert layer.counts is None
    plan.save(tmp_path / "plan.json")
    assert "counts" not in (tmp_path / "plan.json").read_text()
    loaded = MergePlan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    assert loaded == plan == plan_merge(_model(), _statistics(), config), "whatever else was collected"


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 0.1, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("minimum", [1, 2])
def test_adaptive_plans_keep_exactly_the_total(experts: float, minimum: int) -> None:
    total = experts * 4 if isinstance(experts, int) else max(4, round(experts * 32))
    if minimum * 4 > total:
        with pytest.raises(ValueError, match=f"min_experts=2 in 4 layers is more than the {total} experts"):
            _plan(experts=experts, min_experts=minimum)
        return
    kept = [len(layer.dominant) for layer in _plan(experts=experts, min_experts=minimum).layers.values()]
    assert sum(kept) == total
    assert min(kept) >= minimum


def test_each_layer_keeps_as_many_groups_as_their_capacity_takes() -> None:
    for layer in _plan(experts=3, capacity=4).layers.values():
        sizes = [len(layer.members(group)) for group in range(len(layer.dominant))]
        assert len(sizes) >= 2
        assert max(sizes) <= 4
    assert any(max(map(layer.expert_map.count, layer.expert_map)) > 4 for layer in _plan(experts=3).layers.values())


SKIPS = [  # patterns, layers that are left to merge
    ((), [0, 1, 2, 3]),
    ("model.layers.0.*", [1, 2, 3]),
    (("model.layers.0.*", "*.3.mlp.experts"), [1, 2]),
    (["*layers.[12]*"], [0, 3]),
    (("model.layers.2.mlp.experts", "*.2.*"), [0, 1, 3]),
]


@pytest.mark.parametrize(("skip", "left"), SKIPS)
def test_skipped_layers_stay_out_of_plan_and_budget(skip: Any, left: list[int]) -> None:
    plan = _plan(experts=3, skip=skip)
    assert list(plan.layers) == [f"model.layers.{number}.mlp.experts" for number in left]
    assert sum(len(layer.dominant) for layer in plan.layers.values()) == 3 * len(left)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"skip": "encoder.*"},
        "skip='encoder.*' matches no layer. The layers are: model.layers.0.mlp.experts, model.layers.1.mlp.experts, ",
    ),
    ({"skip": ("*.0.*", "*.9.*")}, "skip='*.9.*' matches no layer"),
    ({"skip": "*"}, "skip=['*'] leaves no layer"),
    ({"experts": 9}, "experts=9 is more than the 8 experts of model.layers.0.mlp.experts"),
    ({"experts": 1, "min_experts": 2}, "min_experts=2 in 4 layers is more than the 4 experts to keep"),
    ({"experts": 1.0, "min_experts": 9}, "min_experts=9 in 4 layers is more than"),
    ({"experts": 2, "capacity": 3}, "capacity=3 is too few for the 8 groups that all layers have together"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_met_is_refused_before_any_forward(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _plan(**options)
    model = copy.deepcopy(_model())
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=re.escape(message)):
        compress(model, batches("mixtral", model), MergeConfig(**options))


MISSPELT = [
    ({"budget": "adaptiv"}, "Unknown budget method 'adaptiv'. Did you mean 'adaptive'?"),
    ({"saliency": "freqency"}, "Unknown saliency method 'freqency'. Did you mean 'frequency'?"),
    ({"similarity": "router-logits"}, "Unknown similarity method 'router-logits'. Did you mean 'router_logits'?"),
    ({"grouping": "dominants"}, "Unknown grouping method 'dominants'. Did you mean 'dominant'?"),
    ({"alignment": "weight_match"}, "Unknown alignment method 'weight_match'. Did you mean 'weight_matching'?"),
    ({"weighting": "Uniform"}, "Unknown weighting method 'Uniform'. Did you mean 'uniform'?"),
    ({"reference": "fist"}, "Unknown reference 'fist'. Did you mean 'first'?"),
    ({"weighting": None}, "Unknown weighting method None. Known: 'saliency', 'uniform', 'dominant', "),
    *(
        ({"experts": value}, f"experts={value!r} must be a whole number")
        for value in (0, -1, 0.0, 1.5, True, "8", None)
    ),
    *(({"experts": value}, f"experts={value!r} must be a whole number") for value in (float("nan"), torch.tensor(8))),
    ({"min_experts": 0}, "min_experts=0 must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), MISSPELT)
def test_a_bad_option_is_refused_at_once_and_says_what_was_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MergeConfig(**options)


@pytest.mark.parametrize(
    "options", [{}, {"experts": 3, "skip": "*.1.*"}, {"experts": 0.3, "budget": "uniform", "seed": 7}]
)
def test_a_plan_survives_json_bit_by_bit(options: dict[str, Any], tmp_path: Path) -> None:
    plan = _plan(**options)
    plan.save(tmp_path / "plan.json")
    assert MergePlan.load(str(tmp_path / "plan.json")) == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["layers"].keys() == plan.layers.keys()
    assert content["config"] == plan.config


def test_a_plan_is_readable_one_line_per_list(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    maps = [json.loads(line.partition(": ")[2].rstrip(",")) for line in lines if '"expert_map"' in line]
    assert maps == [layer.expert_map for layer in plan.layers.values()]


def test_a_plan_says_where_it_comes_from() -> None:
    model = copy.deepcopy(_model())
    model.name_or_path = "org/name"
    plan = plan_merge(model, _statistics(), MergeConfig(experts=0.25, skip="*.0.*"))
    found = plan.provenance
    assert found["model"] == "org/name"
    assert found["model_type"] == "mixtral"
    assert found["fingerprint"] == plan.fingerprint == _statistics().fingerprint
    assert set(found["tokens"].values()) == {int(sum(b["attention_mask"].sum() for b in batches("mixtral", model)))}
    assert found["versions"] == {name: version(name) for name in ("hf_mcsmoe", "transformers", "torch")}
    assert plan.config == {**MergeConfig().resolved().to_dict(), "experts": 0.25, "skip": ["*.0.*"]}


def test_a_local_path_does_not_get_into_a_plan(tmp_path: Path) -> None:
    model = copy.deepcopy(_model())
    model.name_or_path = str(tmp_path / "mine")
    plan = plan_merge(model, _statistics())
    assert plan.provenance["model"] == "mine"
    assert str(tmp_path) not in plan.to_json()


BAD_FILES = {
    "text": "# not json",
    "list": "[1, 2]",
    "other json": '{"a": 1}',
    "other format": '{"format": "x", "format_version": 1, "layers": {}}',
    "later version": '{"format": "mcsmoe-plan", "format_version": 2, "layers": {}}',
    "no layers": '{"format": "mcsmoe-plan", "format_version": 1}',
    "half a layer": '{"format": "mcsmoe-plan", "format_version": 1, "layers": {"a": {"expert_map": [0]}}}',
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_plan_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(BAD_FILES[kind])
    with pytest.raises(ValueError, match=r"(is no merge plan|is cut off or damaged).* delete it,? and make one with"):
        MergePlan.load(tmp_path / "plan.json")


def _first(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plan: next(iter(plan["layers"].values())).update(values)


def _config(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda plan: plan["config"].update(values)


# What is done to a plan's JSON, and words of the refusal.
DAMAGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (_first(expert_map=None), "expert_map=None must be a list"),
    (_first(expert_map=[0.0] * 8), "expert_map=[0.0"),
    (_first(expert_map=["0"] * 8), "expert_map=['0'"),
    (_first(expert_map=[True] * 8), "expert_map=[True"),
    (_first(expert_map=[-1] * 8), "expert_map=[-1"),
    (_first(expert_map=[]), "must send experts to the groups"),
    (_first(expert_map=[10**9] * 8), "must send experts to the groups"),
    (_first(dominant="0"), "dominant='0' must be a list"),
    (_first(dominant=[0, 0, 0, 0]), "each of dominant"),
    (_first(dominant=[99, 1, 2, 3]), "each of dominant"),
    (_first(weights=[2.0, -1.0] * 4), "weights=[2.0, -1.0"),
    (_first(weights=[math.nan] * 8), "weights=[nan"),
    (_first(weights=[math.inf] * 8), "weights=[inf"),
    (_first(weights=["1"] * 8), "weights=['1'"),
    (_first(weights=[1.0]), "weights=[1.0] must have one entry for each of 8 experts"),
    (_first(counts=[-1] * 8), "counts=[-1"),
    (_first(counts=[0.5] * 8), "counts=[0.5"),
    (_first(similarity=["x"] * 8), "similarity=['x'"),
    (_first(surprise=1), "surprise"),
    (lambda plan: plan.pop("fingerprint"), "'fingerprint'"),
    (lambda plan: plan.update(fingerprint=5), "fingerprint=5 must be text"),
    (lambda plan: plan.pop("config"), "'config'"),
    (lambda plan: plan.update(config=[1]), "is no merge plan"),
    (lambda plan: plan.update(config=None), "is no merge plan"),
    (lambda plan: plan.update(tokens={}), "is no merge plan"),
    (lambda plan: plan.update(tokens=dict.fromkeys(plan["layers"], -5)), "counts=[-5"),
    (lambda plan: plan.update(layers={}), "it has no layers"),
    (lambda plan: plan.update(layers=[]), "is no merge plan"),
    (lambda plan: plan.update(format_version=None), "is no merge plan"),
    (lambda plan: plan.update(format_version="1"), "is no merge plan"),
    (_config(alignment="nothing"), "Unknown alignment method 'nothing'"),
    (_config(merging=5), "is no merge plan"),
    (_config(reference="last"), "Unknown reference 'last'"),
    (_config(seed="0"), "seed='0'"),
    (_config(seed=1.5), "seed=1.5"),
    (_config(experts=0), "experts=0"),
    (_config(experts=math.nan), "experts=nan"),
    (_config(surprise=1), "surprise"),
    (lambda plan: plan["config"].pop("alignment"), "'alignment'"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_plan_that_is_impossible_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    plan = json.loads(plan_merge(_model(), _statistics(), MergeConfig(experts=4)).to_json())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MergePlan.load(tmp_path / "plan.json")
    assert "delete it and make one with plan_merge" in str(error.value)


def test_a_plan_of_layers_that_the_model_has_not_is_refused() -> None:
    plan = plan_merge(_model(), _statistics(), MergeConfig(experts=4))
    other = replace(plan, layers={f"x.{name}": layer for name, layer in plan.layers.items()})
    with pytest.raises(ValueError, match="made for another model; make one with plan_merge"):
        merge_experts(_model(), other)


INCONSISTENT = [
    ([0, 2], [0], [1, 1], "must send experts to the groups 0 to 0"),
    ([0, 0, 2], [0, 1, 2], [0.5, 0.5, 1], "must send experts to the groups 0 to 2"),
    (
        [0, 1, 1],
        [1, 0],
        [1, 0.5, 0.5],
        "must send experts to the groups 0 to 1, and each of dominant=[1, 0] to its own",
    ),
    ([0, 1], [0, 2], [1, 1], "each of dominant=[0, 2] to its own"),
    ([0, 1], [0, -1], [1, 1], "each of dominant=[0, -1] to its own"),
    ([0, 0], [0], [1], "must have one entry for each of 2 experts"),
    ([0, 0], [0], [0.5, 0.4], "must sum to 1 in each group"),
    ([0, 0, 1], [0, 2], [0, 0, 1], "must sum to 1 in each group"),
]


@pytest.mark.parametrize(("expert_map", "dominant", "weights", "message"), INCONSISTENT)
def test_a_layer_plan_that_does_not_fit_together_is_refused(
    expert_map: list[int], dominant: list[int], weights: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerPlan(expert_map, dominant, weights)


def test_a_loaded_plan_whose_dominant_expert_is_not_there_is_refused(tmp_path: Path) -> None:
    head = {"format": "mcsmoe-plan", "format_version": 1}
    layer = {"expert_map": [0, 1], "dominant": [0, 5], "weights": [1, 1]}
    (tmp_path / "plan.json").write_text(json.dumps({**head, "layers": {"a": layer}}))
    with pytest.raises(ValueError, match=re.escape("dominant=[0, 5] to its own")):
        MergePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("counts", [[2, 2, 2], [2] * 5, [2, 2, 2, 0], [9, 1, 1, 1], [2.0] * 4, [True] * 4, ["2"] * 4])
def test_what_a_budget_of_ones_own_answers_is_checked(counts: list[Any]) -> None:
    message = f"answered {counts!r}; it must return whole numbers of experts to keep, one for each of the 4 layers"
    with pytest.raises(ValueError, match=re.escape(message)):
        _plan(experts=2, budget=lambda saliency, experts, min_experts: counts)


def test_few_tokens_are_a_warning_that_names_the_layer() -> None:
    model = build("switch_transformers")
    for layer in moe_layers(model):
        layer.router.expert_capacity = 99
    batch = inputs("switch_transformers", model, batch_size=6)
    statistics = collect_statistics(model, [batch])  # 69 tokens in the encoder, 72 in the decoder
    plan_merge(model, statistics)
    decoder = [layer.name for layer in moe_layers(model) if "decoder" in layer.name]
    batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    batch["decoder_attention_mask"][:, 10:] = 0
    statistics = collect_statistics(model, [batch])
    with pytest.warns(
        UserWarning, match=re.escape(f"Few calibration tokens (60) in {', '.join(decoder)}: ")
    ) as caught:
        plan_merge(model, statistics)
    assert [warning.filename for warning in caught] == [__file__]


def test_statistics_of_another_model_are_refused() -> None:
    for other in (build("mixtral", seed=1), _model("qwen3_moe")):
        with pytest.raises(ValueError, match="taken from another model"):
            plan_merge(other, _statistics())


def test_statistics_with_nan_are_refused() -> None:
    statistics = copy.deepcopy(_statistics())
    statistics["model.layers.2.mlp.experts"]["logit_gram"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts gave values that are not finite"):
        plan_merge(_model(), statistics)


def test_a_plan_of_another_model_or_of_missing_layers_is_refused() -> None:
    plan = _plan(experts=2)
    with pytest.raises(ValueError, match="made for another model"):
        merge_experts(build("mixtral", seed=1), plan)
    stranger = replace(plan, layers={"model.layers.9.mlp.experts": next(iter(plan.layers.values()))})
    shorter = replace(plan, layers=dict.fromkeys(plan.layers, LayerPlan([0, 0], [0], [0.5, 0.5])))
    for wrong in (stranger, shorter):
        with pytest.raises(ValueError, match="made for another model"):
            merge_experts(_model(), wrong)


def test_methods_may_be_callables_and_are_written_by_name() -> None:
    used = []

    def backwards(view: LayerView, reference: int, expert: int) -> torch.Tensor:
        used.append("alignment")
        return torch.arange(len(view.experts.expert(expert)["up"])).flip(0)

    def last_first(view: LayerView) -> torch.Tensor:
        used.append("saliency")
        return torch.arange(8.0)

    grouping = groups_of([0, 0, 0, 0, 1, 1, 1, 1], [3, 7])
    plan = _plan(experts=2, saliency=last_first, grouping=grouping, alignment=backwards)
    assert used == ["saliency"] * 4
    assert plan.layers["model.layers.0.mlp.experts"].weights == pytest.approx(
        [0, 1 / 6, 2 / 6, 3 / 6] + [x / 22 for x in range(4, 8)]
    )
    assert plan.config["alignment"] == f"{__name__}.{backwards.__qualname__}"
    merge_experts(_model(), plan)
    assert used.count("alignment") == 4 * (2 + 3), "members of weight other than 0, without the dominant ones"


def test_a_loaded_plan_that_names_an_unknown_alignment_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    plan, model = _plan(experts=2), copy.deepcopy(_model())
    (tmp_path / "plan.json").write_text(plan.to_json().replace('"weight_matching"', '"weight_matcher"'))
    with pytest.raises(ValueError, match="Unknown alignment method 'weight_matcher'"):
        merge_experts(model, MergePlan.load(tmp_path / "plan.json"), consume=True)
    assert type(model) is type(_model())
    assert type(model.config) is type(_model().config)


def test_layers_that_share_their_experts_share_their_plan() -> None:
    layers = moe_layers(_model("diffusion_gemma"))
    plan = _plan("diffusion_gemma", experts=2)
    halves = [plan.layers[layer.name] for layer in layers[:4]], [plan.layers[layer.name] for layer in layers[4:]]
    assert halves[0] == halves[1]
    assert sum(len(item.dominant) for item in halves[0]) == 2 * 4
    first, twin = layers[0].name, layers[4].name
    assert {layer.name for layer in layers} - _plan("diffusion_gemma", experts=2, skip=first).layers.keys() == {
        first,
        twin,
    }
    halved = replace(plan, layers={name: item for name, item in plan.layers.items() if name != twin})
    with pytest.raises(ValueError, match=f"The layers {first}, {twin} share their experts"):
        merge_experts(_model("diffusion_gemma"), halved)
