"""Bits shared out among experts: the least error for the bytes there are, against an exhaustive search."""

import itertools

import pytest
import torch
from families import build
from helpers import batches

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.calibration.inputs import stream_inputs
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.quantization.balance import balanced_grids, shared_out
from hf_mcsmoe.quantization.packing import expert_bytes
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.repair import matching_layers


def fitted(name: str) -> tuple[LayerFit, MoELayer]:
    """Return the first layer of a model merged to four experts, beside the original one."""
    model = build(name)
    data = batches(name, model, number=4)
    plan = plan_merge(model, collect_statistics(model, data), MergeConfig(experts=4, budget="uniform"))
    layer, original = matching_layers(merge_experts(model, plan), model)[0][0]
    _, inputs = next(stream_inputs([[original]], data))
    expert_map = list(layer.expert_map or ())
    fit = LayerFit(layer.name, layer.container, original.read(), inputs.mapped(expert_map), inputs, expert_map)
    return fit, original


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_as_many_bytes_errs_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, 1, generator=generator).double() ** 3
    errors, sizes = weights * torch.tensor([64.0, 16, 4, 1]), torch.tensor([[2.0, 3, 4, 8]]).repeat(5, 1).double()
    picks = shared_out(errors, sizes, 20)
    assert picks is not None
    taken = sizes.gather(1, picks[:, None]).sum()
    assert taken <= 20
    others = [
        sum(float(errors[item, pick]) for item, pick in enumerate(other))
        for other in itertools.product(range(4), repeat=5)
        if sum(float(sizes[item, pick]) for item, pick in enumerate(other)) <= taken
    ]
    assert float(errors.gather(1, picks[:, None]).sum()) == pytest.approx(min(others))


def test_no_choice_keeps_to_too_few_bytes() -> None:
    assert shared_out(torch.ones(2, 2).double(), torch.ones(2, 2).double(), 1) is None


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_a_layer_errs_less_in_no_more_bytes_and_keeps_its_weights(name: str) -> None:
    (layer, original), grids = fitted(name), (Grid(3, 8), Grid(3, 8))
    layer.experts.down_proj.data[0] *= 8  # one of which an error costs more
    before = {key: value.clone() for key, value in layer.experts.state_dict().items()}
    found = balanced_grids(layer, *grids, (2, 3, 4, 8))
    for key, value in layer.experts.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)

    def taken(grids: list[Grid], weight: str) -> int:
        hidden, width = original.hidden_size, original.intermediate_size
        shape = (hidden, width) if weight == "down_proj" else (width * (1 + layer.experts.has_gate), hidden)
        return sum(expert_bytes(shape, grid, torch.float32) for grid in grids)

    first = "gate_up_proj" if layer.experts.has_gate else "up_proj"
    total = taken(found.w_in, first) + taken(found.w_out, "down_proj")
    assert total <= taken([grids[0]] * 4, first) + taken([grids[1]] * 4, "down_proj")
    assert 0 < found.gain < 1
    assert found.w_in[0].bits + found.w_out[0].bits > 6


def test_one_number_of_bits_stays_what_it_is() -> None:
    (layer, _), grid = fitted("mixtral"), Grid(4, 8)
    assert balanced_grids(layer, grid, grid, (4,)).w_in == [grid] * 4
