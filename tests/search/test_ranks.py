"""Low rank + sparse among what a size may choose: its bytes, its part in the curves, and the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build
from helpers import batches, logits
from transformers import AutoModelForCausalLM

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.low_rank.decompose import decompose_container
from hf_mcsmoe.methods.choice import Choice, Grid
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.quantization.layer import round_experts
from hf_mcsmoe.quantization.packing import store_codes
from hf_mcsmoe.search.choices import HEADER, MORE_OF_FACTORS, ExpertShape, candidates, grids, ranks
from hf_mcsmoe.search.conditions import check_curves, conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of

SMALL = SizeConfig(0.5, group_size=4, ranks=(1,), bits=(8, 4))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "switch_transformers", "dbrx"])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_bytes_of_a_rank_are_those_that_are_stored(family: str, bits: int | None) -> None:
    model = build(family)
    data = batches(family, model)
    merged = compress(model, data, MergeConfig(experts=0.5))
    original, layer = Layers.of(model)[0], Layers.of(merged)[0]
    inputs = capture_inputs([layer], data)[layer.name]
    decompose_container(layer.container, 1, 0.1, inputs)
    choice = Choice(layer.container.num_experts, rank=1)
    if bits:
        w_in, w_out = (next(grid for grid in own if grid.bits == bits) for own in grids(original, SMALL))
        for name, codes in round_experts(layer.container, w_in, w_out).items():
            store_codes(layer.container, name, codes)
        choice = replace(choice, w_in=w_in, w_out=w_out)
    held = {name: value for name, value in layer.container.state_dict().items() if "map" not in name}
    told = ExpertShape.of(original).bytes(choice) - HEADER * MORE_OF_FACTORS
    assert told == sum(value.nbytes for value in held.values())
    assert len(held) <= MORE_OF_FACTORS + 2 + 2  # two of them were weights, two may be biases


def test_ranks_are_offered_where_they_save_bytes() -> None:
    layers = Layers.of(build("mixtral"))
    shared, side = [layers[0]], min(layers[0].hidden_size, layers[0].intermediate_size)
    assert ranks(shared, replace(SMALL, ranks=())) == []
    assert {choice.rank for choice in candidates(shared, SMALL)} == {1}
    assert {choice.rank for choice in candidates(shared, replace(SMALL, ranks=(1, 2)))} == {None, 1, 2}
    assert {choice.rank for choice in candidates([layers[0], layers[1]], replace(SMALL, ranks=None))} == {None}
    with pytest.raises(ValueError, match=f"rank={side} makes the experts of .* no smaller"):
        ranks(shared, replace(SMALL, ranks=(1, side)))


@pytest.mark.slow
def test_a_rank_that_is_asked_for_is_measured_stored_and_loads(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    data = batches("qwen3_moe", model)
    result = compress(model, data, size=SMALL, held_out=data[:1])
    told = record_of(result)
    assert {rank for item in told.layers.values() for rank in item.rank.values()} == {1}
    assert told.size is not None
    assert "of rank 1 + sparse" in told.size.reason
    result.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) <= told.size.asked
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data[0]), logits(result, data[0]))


def test_curves_without_the_ranks_to_choose_from_are_refused_at_the_start() -> None:
    model = build("mixtral")
    layers, search = Layers.of(model), replace(SMALL, ranks=None)
    known = ranks([layers[0]], search)
    assert known
    statistics = RoutingStatistics(layers.fingerprint, {layer.name: Sums() for layer in layers})
    statistics.curves = {layer.name: LayerCurves(layer.num_experts) for layer in layers}
    statistics.conditions = conditions(MergeConfig(), search, JOINT)
    with pytest.raises(ValueError, match=f"rank={min(known)} costs was not measured"):
        check_curves(layers, statistics, MergeConfig(), search, JOINT)
    check_curves(layers, statistics, MergeConfig(), replace(search, ranks=()), JOINT)


@pytest.mark.slow
def test_a_size_may_be_reached_by_ranks_alone() -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    result = compress(model, data, size=SizeConfig(0.6, bits=(), ranks=(1,)))
    told = record_of(result)
    assert not any(item.bits for item in told.layers.values())
    assert {rank for item in told.layers.values() for rank in item.rank.values()} == {1}


@pytest.mark.slow
def test_what_ranks_cost_is_measured_and_kept(tmp_path: Path) -> None:
    model = build("mixtral")
    layers, data, merge = Layers.of(model), batches("mixtral", model), MergeConfig()
    search = replace(SMALL, ranks=(1, 4))
    statistics = collect_statistics(layers, data, needs_of(merge, search))
    statistics.curves = measure_curves(layers, statistics, data, merge, search)
    for curves in statistics.curves.values():
        assert min(part.error for parts in curves.low_rank.values() for part in parts.values()) > 0
        assert {bits for parts in curves.low_rank.values() for bits in parts} == {0, 4, 8}
        whole, low = Choice(curves.experts), Choice(curves.experts, rank=1)
        assert curves.effect(low) == curves.effect(whole) + curves.low_rank[1][0].effect
        with pytest.raises(ValueError, match="rank=1 at 4/8 bits was not measured"):
            curves.effect(replace(low, w_in=Grid(4, 4), w_out=Grid(8, 4)))
    statistics.save(tmp_path / "scores.safetensors")
    assert type(statistics).load(tmp_path / "scores.safetensors").curves == statistics.curves
