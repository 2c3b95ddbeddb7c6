"""What may be chosen for a layer, from shapes alone."""

import itertools
from dataclasses import replace

import pytest
from families import build
from helpers import batches
from transformers import AutoModel

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.search.choices import (
    candidates,
    choice_bytes,
    choose,
    fixed_bytes,
    nearest_count,
    single_methods,
    smallest_bytes,
    whole_bytes,
)
from hf_mcsmoe.search.config import MODEL, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of


def test_a_router_that_picks_by_groups_is_cut_by_as_many_in_each() -> None:
    model = build("deepseek_v3")
    layer, config = Layers.of(model)[0], SizeConfig()
    groups, in_group = model.config.n_group, max(2, -(-model.config.num_experts_per_tok // model.config.topk_group))
    pruned = {choice.experts for choice in candidates([layer], config) if choice.reduce == "prune"}
    allowed = range(groups * in_group, layer.num_experts, groups)
    assert pruned <= set(allowed)
    assert nearest_count(layer, 1, "prune", config) == min(groups * in_group, layer.num_experts)
    assert nearest_count(layer, 1, "merge", config) == layer.top_k


def test_one_number_of_bits_means_exactly_that() -> None:
    layers = Layers.of(build("mixtral"))
    config = SizeConfig(bits=(4,), min_experts=3)
    choices = candidates([layers[0]], config)
    assert {grid and grid.bits for choice in choices for grid in (choice.w_in, choice.w_out)} == {4}
    assert list(single_methods(layers, config)) == ["all experts at 4 bits"]
    several = single_methods(layers, SizeConfig(min_experts=3))
    assert min(choice.experts for item in several.values() for choice in item.choices.values()) == 3


def test_a_model_that_tells_no_distribution_is_refused() -> None:
    head = build("mixtral")
    model = AutoModel.from_config(head.config)
    layers, data = Layers.of(model), batches("mixtral", head)
    statistics = collect_statistics(layers, data, needs_of(MergeConfig(), SizeConfig()))
    with pytest.raises(ValueError, match="MixtralModel tells no distribution"):
        measure_curves(layers, statistics, data, MergeConfig(), SizeConfig())


@pytest.mark.parametrize("changes", [{"budget": "uniform"}, {"experts": 8}, {"reduce": "prune"}, {"min_experts": 2}])
def test_options_by_hand_are_refused_beside_a_size(changes: dict[str, object]) -> None:
    model = build("mixtral")
    ((name, _),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name}=.* does nothing beside size=0.6"):
        compress(model, batches("mixtral", model), MergeConfig(**changes), size=0.6)


def test_what_is_alike_in_all_layers_is_the_best_of_all_that_is() -> None:
    layers = Layers.of(build("qwen3_moe"))
    search = SizeConfig(0.5, bits=(8, 2), group_size=8, uniform_experts=True, alike=MODEL, counts=(4, 8), ranks=())
    options = [candidates([layer], search) for layer in layers]
    kinds = {(choice.experts, choice.w_in and choice.w_in.bits) for choices in options for choice in choices}
    assert kinds == {(count, bits) for count in (4, 8) for bits in (None, 8, 2)}
    curves = {}
    for number, (layer, choices) in enumerate(zip(layers, options, strict=True), 1):
        grids = {choice.w_in: Part(1.0, 2.0**-choice.w_in.bits / number) for choice in choices if choice.w_in}
        reduced = {reduce: {4: Part(1.0, 0.1 * at / number)} for at, reduce in enumerate(("merge", "prune"), 1)}
        curves[layer.name] = LayerCurves(layer.num_experts, reduced, grids, grids)
    table = [
        [((x.experts, x.w_in), choice_bytes(layer, x), curves[layer.name].effect(x)) for x in choices]
        for layer, choices in zip(layers, options, strict=True)
    ]
    alike = [own for own in itertools.product(*table) if len({kind for kind, *_ in own}) == 1]
    for share in (0.15, 0.3, 0.6):
        room = int(share * whole_bytes(layers))
        found = [sum(x[2] for x in own) for own in alike if sum(x[1] for x in own) <= room]
        chosen = choose(layers, curves, search, fixed_bytes(layers) + room)
        assert len({(choice.experts, choice.w_in) for choice in chosen.choices.values()}) == 1
        assert sum(chosen.predicted.values()) == pytest.approx(min(found))


def test_a_size_that_layers_cannot_reach_together_is_refused_from_shapes_alone() -> None:
    layers = Layers.of(build("qwen3_moe"))
    search = SizeConfig(0.5, bits=(2,), group_size=8, uniform_experts=True, counts=(8,), alike=MODEL, ranks=())
    least = smallest_bytes(layers, search)
    one = candidates([layers[0]], search)
    assert [choice.experts for choice in one] == [8]
    assert least == fixed_bytes(layers) + sum(choice_bytes(layer, one[0]) for layer in layers)
    with pytest.raises(ValueError, match="no number of experts, or no bits, in common"):
        smallest_bytes(layers, replace(search, counts=(9,)))
