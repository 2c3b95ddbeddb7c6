"""What may be chosen for a layer, from shapes alone."""

import pytest
from families import build
from helpers import batches
from transformers import AutoModel

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.search.choices import candidates, nearest_count, single_methods
from hf_mcsmoe.search.config import SizeConfig
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
