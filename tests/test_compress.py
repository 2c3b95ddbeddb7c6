"""Merged models: planted copies merge back, experts equal the oracle's, and the original is left alone or used up."""

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import oracle
import pytest
import torch
from families import build
from helpers import batches, groups_of, logits, relative_error, shuffled, state
from layouts import LAYOUTS, Expert
from offloaded import OFFLOADED
from transformers import PreTrainedModel

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    MergePlan,
    RepairConfig,
    collect_statistics,
    compress,
    merge_experts,
    moe_layers,
    plan_merge,
)
from hf_mcsmoe.layers import find
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.similarity import SIMILARITY

NUM_EXPERTS = 8


def _experts(name: str, model: PreTrainedModel) -> list[list[Expert]]:
    """Return the experts of each layer of a model that is not merged."""
    return [[LAYOUTS[name].before(layer.container, i) for i in range(NUM_EXPERTS)] for layer in moe_layers(model)]


def _stored(name: str, model: PreTrainedModel) -> list[list[Expert]]:
    """Return the experts of each layer of a merged model."""
    return [[LAYOUTS[name].after(layer.container, i) for i in range(layer.num_experts)] for layer in moe_layers(model)]


def _plant(name: str, seed: int | None) -> PreTrainedModel:
    """Make a model whose experts are all copies of the first, their neurons shuffled by `seed` unless it is None."""
    model = build(name)
    for number, experts in enumerate(_experts(name, model)):
        original = {role: value.clone() for role, value in experts[0].items()}
        for index, expert in enumerate(experts[1:], start=1):
            planted = original if seed is None else shuffled(original, seed=seed + 100 * number + index)
            for role, value in planted.items():
                expert[role].copy_(value)
    return model


def _plan(name: str, model: PreTrainedModel, **options: Any) -> MergePlan:
    return plan_merge(model, collect_statistics(model, batches(name, model)), MergeConfig(**options))


@pytest.mark.parametrize("name", LAYOUTS)
def test_shuffled_copies_of_one_expert_merge_back_to_it(name: str) -> None:
    same, planted = _plant(name, None), _plant(name, 1)
    batch = batches(name, same, 1)[0]
    expected = logits(same, batch)
    assert relative_error(logits(planted, batch), expected) < 1e-5, "a shuffled expert computes the same"
    plan = _plan(name, planted, experts=1)
    merged = merge_experts(planted, plan)
    assert relative_error(logits(merged, batch), expected) < 1e-5
    for layer, before, after in zip(plan.layers.values(), _experts(name, planted), _stored(name, merged), strict=True):
        assert len(after) == 1
        for role, value in before[layer.dominant[0]].items():
            assert relative_error(after[0][role], value) < 1e-6


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "gpt_oss", "aria"])
def test_the_first_expert_can_be_the_reference_of_all(name: str) -> None:
    planted = _plant(name, 2)
    grouping = groups_of([0, 0, 1, 1, 1, 1, 0, 1], [6, 3])
    plan = _plan(name, planted, experts=2, grouping=grouping, reference="first", weighting="uniform")
    merged = merge_experts(planted, plan)
    for before, after in zip(_experts(name, planted), _stored(name, merged), strict=True):
        for expert in after:
            assert all(relative_error(expert[role], value) < 1e-6 for role, value in before[0].items())


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "gpt_oss", "aria"])
def test_without_alignment_shuffled_copies_are_spoilt(name: str) -> None:
    planted = _plant(name, 3)
    batch = batches(name, planted, 1)[0]
    merged = merge_experts(planted, _plan(name, planted, experts=1, alignment="none", weighting="uniform"))
    assert relative_error(logits(merged, batch), logits(planted, batch)) > 1e-2
    for before, after in zip(_experts(name, planted), _stored(name, merged), strict=True):
        for role, value in after[0].items():
            mean = sum(expert[role].double() for expert in before) / NUM_EXPERTS
            assert relative_error(value, mean) < 1e-6


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "qwen3_moe", "aria", "jetmoe", "dbrx", "llama4"])
def test_merged_experts_equal_the_oracle(name: str) -> None:
    model = build(name)
    statistics = collect_statistics(model, batches(name, model))
    plan = plan_merge(model, statistics, MergeConfig(experts=3))
    merged = merge_experts(model, plan)
    for (layer, item), before, after in zip(
        plan.layers.items(), _experts(name, model), _stored(name, merged), strict=True
    ):
        assert len(after) == len(item.dominant)
        for number, dominant in enumerate(item.dominant):
            members = [expert for expert in range(NUM_EXPERTS) if item.expert_map[expert] == number]
            expected = oracle.merged(before, members, dominant, statistics[layer].counts.tolist())
            assert all(relative_error(after[number][role], value) < 1e-6 for role, value in expected.items())


def test_pruning_keeps_the_dominant_experts_bit_for_bit() -> None:
    model = build("gpt_oss")
    plan = _plan("gpt_oss", model, experts=3, weighting="dominant")
    merged = merge_experts(model, plan)
    for item, before, after in zip(
        plan.layers.values(), _experts("gpt_oss", model), _stored("gpt_oss", merged), strict=True
    ):
        for dominant, expert in zip(item.dominant, after, strict=True):
            assert all(torch.equal(expert[role], value) for role, value in before[dominant].items())


def test_a_group_that_no_token_reached_is_averaged_uniformly() -> None:
    model = build("gpt_oss")
    for layer in moe_layers(model):
        layer.router.bias.data[4:] = -100  # four of eight are picked, and these never
    plan = _plan("gpt_oss", model, experts=2, grouping=groups_of([0, 0, 0, 0, 1, 1, 1, 1], [0, 5]), alignment="none")
    merged = merge_experts(model, plan)
    for before, after in zip(_experts("gpt_oss", model), _stored("gpt_oss", merged), strict=True):
        for role, value in after[1].items():
            assert relative_error(value, sum(expert[role].double() for expert in before[4:]) / 4) < 1e-6


def _storages(model: PreTrainedModel) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


CONSUMED = [*LAYOUTS, "diffusion_gemma"]


@pytest.mark.parametrize("name", CONSUMED)
def test_the_input_stays_unchanged_and_shares_nothing_unless_it_is_consumed(name: str) -> None:
    model = build(name)
    plan = _plan(name, model, experts=2, skip=f"*{moe_layers(model)[0].name}")
    before = state(model)
    merged = merge_experts(model, plan)
    assert state(model) == before
    assert type(model) in type(merged).__mro__
    assert type(model) is not type(merged)
    assert not _storages(model) & _storages(merged)
    consumed = merge_experts(model, plan, consume=True)
    assert consumed is model
    assert type(consumed) is type(merged)
    assert consumed.config.to_dict() == merged.config.to_dict()
    assert list(consumed.state_dict()) == list(merged.state_dict())
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in consumed.state_dict().items())
    batch = batches(name, model, 1)[0]
    assert torch.equal(logits(consumed, batch), logits(merged, batch))
    assert consumed.num_parameters() < before["parameters"]


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modes_and_frozen_parameters_are_carried_over(consume: bool, training: bool) -> None:
    for name in ("mixtral", "switch_transformers"):
        model = build(name).bfloat16().train(training)
        model.get_input_embeddings().requires_grad_(False)
        merged = merge_experts(model, _plan(name, model, experts=2), consume=consume)
        assert {module.training for module in merged.modules()} == {training}
        assert not merged.get_input_embeddings().weight.requires_grad
        experts = [parameter for layer in moe_layers(merged) for _, parameter in layer.parameters]
        assert all(parameter.requires_grad for parameter in experts)
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("place", OFFLOADED)
def test_an_offloaded_model_gives_the_same_result_in_memory(place: str, consume: bool, tmp_path: Path) -> None:
    plain = build("mixtral")
    plan, batch = _plan("mixtral", plain, experts=2, skip="*.3.*"), batches("mixtral", plain, 1)[0]
    expected = merge_experts(plain, plan)
    model = OFFLOADED[place](build("mixtral"), tmp_path)
    where = [parameter.device.type for parameter in model.parameters()]
    merged = merge_experts(model, plan, consume=consume)
    assert {parameter.device.type for parameter in merged.parameters()} == {"cpu"}
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in merged.state_dict().items())
    assert torch.equal(logits(merged, batch), logits(expected, batch))
    assert torch.equal(logits(merged.to(torch.bfloat16), batch), logits(expected.to(torch.bfloat16), batch))
    merged.save_pretrained(tmp_path / "saved")
    if consume:
        assert merged is model
        return
    assert [parameter.device.type for parameter in model.parameters()] == where
    assert torch.equal(logits(model, batch), logits(plain, batch))


def test_tied_embeddings_of_an_offloaded_model_stay_tied(tmp_path: Path) -> None:
    plain = build("switch_transformers")
    plan = _plan("switch_transformers", plain, experts=2)
    model = merge_experts(accelerate.cpu_offload(build("switch_transformers")), plan)
    assert model.lm_head.weight is model.shared.weight
    assert model.num_parameters() == merge_experts(plain, plan).num_parameters()


def test_broken_weights_are_refused_before_anything_is_changed() -> None:
    for value in (torch.nan, torch.inf):
        model = build("mixtral")
        plan = _plan("mixtral", model, experts=2)
        moe_layers(model)[2].container.down_proj.data[5, 0, 0] = value
        before = state(model)
        with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.down_proj is (nan|inf) at \[5, 0, 0\]"):
            merge_experts(model, plan, consume=True)
        assert state(model) == before


def test_progress_is_told_of_every_layer_that_merges() -> None:
    model, calls = build("mixtral"), []
    plan = _plan("mixtral", model, experts=2, skip="*.1.*")
    merge_experts(model, plan, progress=lambda *call: calls.append(call))
    assert calls == [(f"model.layers.{layer}.mlp.experts", done, 3) for done, layer in enumerate((0, 2, 3), start=1)]


def test_compress_is_statistics_plan_and_merge() -> None:
    model, config = build("mixtral"), MergeConfig(experts=3)
    merged = merge_experts(model, plan_merge(model, collect_statistics(model, batches("mixtral", model)), config))
    once = compress(model, iter(batches("mixtral", model)), config)
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in once.state_dict().items())
    used_up = copy.deepcopy(model)
    assert compress(used_up, batches("mixtral", model), config, consume=True) is used_up
    assert once.num_parameters() == used_up.num_parameters() < model.num_parameters()


def test_routers_and_all_other_parts_are_the_original_ones() -> None:
    for name in ("mixtral", "switch_transformers", "deepseek_v3"):
        model = build(name)
        merged = compress(model, batches(name, model), MergeConfig(experts=2))
        originals = {key: value for key, value in model.state_dict().items() if ".experts." not in key}
        others = {key: value for key, value in merged.state_dict().items() if ".experts." not in key}
        assert originals.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in originals.items())


def test_a_class_of_somebody_else_is_refused_before_anything_is_changed() -> None:
    model = build("mixtral")
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    before = type(model.config)
    with pytest.raises(ValueError, match="only models of Transformers itself"):
        compress(model, batches("mixtral", model), MergeConfig(experts=2), consume=True)
    assert type(model.config) is before


def test_consuming_in_one_call_frees_each_layers_experts_as_it_goes() -> None:
    model = build("switch_transformers")
    experts = [weakref.ref(layer.container) for layer in moe_layers(model)]
    alive: list[int] = []

    def count(stage: str, done: int, total: int) -> None:
        if stage == "merge" and done:
            alive.append(sum(reference() is not None for reference in experts))

    data = batches("switch_transformers", model)
    compress(model, data, MergeConfig(experts=2, budget="uniform"), consume=True, progress=count)
    assert len(experts) > 2
    # The layer that was just done may still be in use.
    assert all(left <= len(experts) - done for done, left in enumerate(alive))
    assert len(alive) == len(experts)


def _experts_alive(model: PreTrainedModel) -> list[weakref.ref]:
    """Return references to one tensor of each layer's experts, which lives as long as they do."""
    return [weakref.ref(layer.parameters[0][1]) for layer in moe_layers(model)]


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers", "dbrx"])
def test_who_keeps_the_layers_of_a_consumed_model_keeps_none_of_their_experts(name: str) -> None:
    model = build(name)
    plan = _plan(name, model, experts=2, budget="uniform")
    layers, experts = moe_layers(model), _experts_alive(model)
    alive: list[int] = []

    def count(name: str, done: int, total: int) -> None:
        alive.append(sum(reference() is not None for reference in experts))

    merge_experts(model, plan, consume=True, progress=count)
    # The layer that was just done may still be in use.
    assert len(alive) == len(layers) > 2
    assert all(left <= len(layers) - done for done, left in enumerate(alive))
    assert sum(reference() is not None for reference in experts) == 0
    assert all(layer.name in dict(model.named_modules()) for layer in layers)


def test_statistics_of_before_need_no_batches() -> None:
    model, config = build("mixtral"), MergeConfig(experts=3)
    data = batches("mixtral", model)
    expected = compress(model, data, config)
    merged = compress(model, [], config, statistics=collect_statistics(model, data))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in merged.state_dict().items())
    flops = [list(each.mcsmoe_record.costs.values())[-1].flops_per_token for each in (merged, expected)]
    assert flops[0] is None
    assert flops[1] > 0
    with pytest.raises(ValueError, match="calibration set is empty"):
        compress(model, [], config)


@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize("as_list", [True, False])
def test_every_stage_tells_of_its_progress(as_list: bool) -> None:
    model, calls = build("mixtral"), []
    data = batches("mixtral", model, number=16)
    options = {"repair": RepairConfig(method="mean_shift"), "low_rank": LoSparseConfig(rank=2, keep=0.25)}
    given = data if as_list else iter(data)
    compress(model, given, MergeConfig(experts=2), **options, progress=lambda *call: calls.append(call))
    # An iterator is kept as a list here, for the stages that come after.
    steps = {"checking": 1, "statistics": 16, "planning": 1, "costs": 3, "merge": 4, "repair": 4, "low rank": 16}
    assert _by_stage(calls) == {stage: [(done, total) for done in range(total + 1)] for stage, total in steps.items()}
    assert list(_by_stage(calls)) == list(steps), "in this order"


@pytest.mark.filterwarnings("ignore:The repair left")
def test_a_second_repair_is_a_stage_of_its_own() -> None:
    model, calls = build("mixtral"), []
    options = {"repair": RepairConfig(method="local", steps=1), "low_rank": LoSparseConfig(rank=2, keep=0.25)}
    compress(
        model,
        batches("mixtral", model),
        MergeConfig(experts=2),
        **options,
        progress=lambda *call: calls.append(call),
    )
    stages = _by_stage(calls)
    assert stages["repair"] == stages["second repair"] == [(done, 4) for done in range(5)]


def _by_stage(calls: list[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Return what was told of each stage, in a row where it says the same twice."""
    told: dict[str, list[tuple[int, int]]] = {}
    for stage, *numbers in calls:
        seen = told.setdefault(stage, [])
        if seen[-1:] != [tuple(numbers)]:
            seen.append(tuple(numbers))
    return told


@pytest.mark.filterwarnings("ignore:The repair left")
@pytest.mark.parametrize("experts", [4, 1.0])
def test_layers_are_found_once_in_each_model_and_routers_hashed_once(
    experts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, searched, hashed = build("mixtral"), [], []
    search, add_weights = find.source_of, find.Layers._add_weights

    def counted_search(origin: Any) -> Any:
        searched.append(type(search(origin).model).__name__)
        return search(origin)

    def counted_weights(layers: Layers, digest: Any, path: str) -> None:
        hashed.append(path)
        add_weights(layers, digest, path)

    monkeypatch.setattr(find, "source_of", counted_search)
    monkeypatch.setattr(find.Layers, "_add_weights", counted_weights)
    options = {"repair": RepairConfig(method="local", steps=2), "low_rank": LoSparseConfig(rank=4)}
    compress(model, batches("mixtral", model, number=4), MergeConfig(experts=experts), **options)
    # Whole layers become merged ones of low rank, and are found again as such.
    merged = ["MCSMoEMixtralForCausalLM"] * (1 if experts == 4 else 2)
    assert searched == ["MixtralForCausalLM", *merged]
    assert len(hashed) == len(set(hashed)) > len(moe_layers(model))


def test_what_cannot_be_done_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    statistics = collect_statistics(model, data)
    before = state(model)
    with pytest.raises(ValueError, match="calibration set is empty"):
        compress(model, [], low_rank=LoSparseConfig(rank=2), statistics=statistics, consume=True)

    def average(view: Any, members: list[int], shares: list[float], permutations: Any) -> Any:
        return MERGING["average"](view, members, shares, permutations)

    average.needs = ("counts",)
    plan = plan_merge(model, statistics, MergeConfig(merging=average))
    with pytest.raises(ValueError, match="read counts: pass the statistics"):
        merge_experts(model, plan, consume=True)
    other = build("mixtral")
    moe_layers(other)[0].router.weight.data += 1
    with pytest.raises(ValueError, match="taken from another model than the plan"):
        merge_experts(model, plan, statistics=collect_statistics(other, data), consume=True)
    assert state(model) == before
    model.save_pretrained(tmp_path / "model")
    for refused in (
        lambda: compress(Layers.of(Folder(tmp_path / "model")), data),
        lambda: merge_experts(Layers.of(Folder(tmp_path / "model")), plan_merge(model, statistics)),
    ):
        with pytest.raises(ValueError, match="with merge_to_folder, or load the model"):
            refused()


@dataclass(frozen=True)
class Scaled:
    """A similarity with a setting of its own."""

    factor: float
    needs: ClassVar[tuple[str, ...]] = ("logit_gram",)

    def __call__(self, view: Any) -> torch.Tensor:
        """Return the cosines times the factor."""
        return self.factor * SIMILARITY["router_logits"](view)


def test_a_method_may_be_an_object_with_settings() -> None:
    model = build("mixtral")
    config = MergeConfig(similarity=Scaled(2.0))
    assert config.to_dict()["similarity"].endswith("test_compress.Scaled")
    given, expected = (compress(model, batches("mixtral", model), each) for each in (config, MergeConfig()))
    assert state(given)["bits"] == state(expected)["bits"]
