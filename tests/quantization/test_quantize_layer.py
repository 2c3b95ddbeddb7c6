"""Layers in few bits: the stored values are those of the codes, in every layout, and nothing else moves."""

import copy
from typing import Any

import pytest
import torch
from helpers import batches
from layouts import LAYOUTS
from merged import example

from hf_mcsmoe.calibration.inputs import stream_inputs
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact, decompose_experts
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.quantization.codes import Codes
from hf_mcsmoe.quantization.layer import Rounding, inputs_of, quantize_layer, round_experts
from hf_mcsmoe.repair.fit import LayerFit, layer_error, original_sum
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import matching_layers

W_IN, W_OUT = Grid(3, 8), Grid(3, 8, symmetric=True)
# One of each layout of merged experts; the others are slow tests.
FEW = ("aria", "gpt_oss", "mixtral", "nemotron_h", "openai_privacy_filter")


def first_layer(name: str, *, low_rank: LoSparseConfig | None = None, prune: bool = True) -> LayerFit:
    """Return a copy of the first merged layer of a family beside the original one."""
    model, student = example(name).base, copy.deepcopy(example(name).merged)
    data = batches(name, model)
    if low_rank:
        decompose_experts(student, low_rank, data if prune else None, prune=prune)
        student = compact(student) if prune else student
    layer, original = matching_layers(student, model)[0][0]
    _, inputs = next(stream_inputs([[original]], data))
    expert_map = list(layer.expert_map or ())
    return LayerFit(layer.name, layer.container, original.read(), inputs.mapped(expert_map), inputs, expert_map)


def values(name: str, experts: Any, codes: dict[str, list[Codes]], expert: int) -> dict[str, torch.Tensor]:
    """Return what the codes of an expert stand for, by role, as the layout has it."""
    first = next(key for key in codes if key != "down_proj")
    both = codes[first][expert].dequantized(torch.float32)
    found = {"down": codes["down_proj"][expert].dequantized(torch.float32)}
    if not experts.has_gate:
        return found | {"up": both}
    gate, up = (both[::2], both[1::2]) if not experts.is_concatenated else both.chunk(2)
    return found | {"gate": gate, "up": up}


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in sorted(LAYOUTS)]
)
def test_every_layout_holds_the_values_of_its_codes(name: str) -> None:
    layer = first_layer(name.replace("llama4", "llama4_text"))
    count, read = layer.experts.num_experts, LAYOUTS[name].after
    before = [{role: value.clone() for role, value in read(layer.experts, expert).items()} for expert in range(count)]
    codes = quantize_layer(layer, W_IN, W_OUT)
    assert {key: [one.grid for one in found] for key, found in codes.items()} == {
        ("gate_up_proj" if layer.experts.has_gate else "up_proj"): [W_IN] * count,
        "down_proj": [W_OUT] * count,
    }
    for expert in range(count):
        now, expected = read(layer.experts, expert), values(name, layer.experts, codes, expert)
        for role, value in now.items():
            torch.testing.assert_close(value, expected.get(role, before[expert][role]), rtol=0, atol=0)
            if role in expected:
                assert 0 < (value - before[expert][role]).norm() < 0.5 * before[expert][role].norm()


def error(layer: LayerFit) -> float:
    token = torch.arange(len(layer.inputs))
    return layer_error(layer, layer.experts, original_sum(layer, normed=True), token)


def test_each_step_brings_the_layer_nearer() -> None:
    layer, grid = first_layer("mixtral"), Grid(2, 8)
    original = copy.deepcopy(layer.experts)

    def reached(*arguments: Any, **options: Any) -> float:
        layer.experts = copy.deepcopy(original)
        quantize_layer(layer, grid, grid, *arguments, **options)
        return error(layer)

    layer.experts = copy.deepcopy(original)
    round_experts(layer.experts, grid, grid)
    plain = error(layer)
    rounded, compensated = reached(method="nearest"), reached()
    refitted = reached(RepairConfig("refit"))
    trained = reached(RepairConfig("local", steps=1))
    assert compensated < rounded < plain * 1.02
    assert refitted < compensated
    assert trained == pytest.approx(reached(RepairConfig("joint")))  # training would undo the codes


def test_each_expert_has_its_own_bits() -> None:
    layer = first_layer("mixtral")
    grids = [Grid(8, 8), Grid(2, 8), Grid(4, 8), *[Grid(2, 8)] * (layer.experts.num_experts - 3)]
    before = layer.experts.gate_up_proj.detach().clone()
    codes = quantize_layer(layer, grids, None)
    assert list(codes) == ["gate_up_proj"]
    assert [one.grid for one in codes["gate_up_proj"]] == grids
    missed = (layer.experts.gate_up_proj - before).flatten(1).norm(dim=1)
    assert missed[0] < missed[2] < missed[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_low_rank_and_sparse_parts_hold_the_values_of_their_codes(name: str) -> None:
    layer = first_layer(name, low_rank=LoSparseConfig(rank=4, keep=0.25))
    experts = layer.experts
    before = {key: value.clone() for key, value in experts.named_parameters()}
    codes = quantize_layer(layer, Grid(4, 32), Grid(4, 32), RepairConfig())
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    assert set(codes) == {f"{weight}_{part}" for weight in (first, "down_proj") for part in "uvs"}
    for key, found in codes.items():
        restored = [one.dequantized(torch.float32) for one in found]
        stored = getattr(experts, key).detach()
        torch.testing.assert_close(stored, torch.cat(restored).view_as(stored), rtol=0, atol=0)
        assert 0 < (stored - before[key]).norm() < before[key].norm()
    untouched = [key for key in before if key not in codes and not key.startswith("down_proj_bias")]
    assert all(torch.equal(before[key], getattr(experts, key)) for key in untouched)


def test_s_in_its_training_form_is_refused() -> None:
    layer = first_layer("mixtral", low_rank=LoSparseConfig(rank=4), prune=False)
    with pytest.raises(ValueError, match="training form: `compact` the model first"):
        round_experts(layer.experts, Grid(4, 32), None)


def test_wide_inputs_have_their_moments_in_blocks() -> None:
    layer = first_layer("mixtral")
    limited, free = (Rounding(copy.deepcopy(layer.experts), memory_limit=limit) for limit in (32 * 32 * 16, 10**9))
    before = layer.experts.gate_up_proj.detach().clone()
    errors = []
    for rounding in (limited, free):
        rounding.weight("gate_up_proj", W_IN, lambda expert: inputs_of(layer, expert))
        states = torch.cat(list(inputs_of(layer, 0)))
        errors.append((states @ (rounding.experts.gate_up_proj[0] - before[0]).T).norm().item())
    assert limited.block(32, 8) == 16
    assert free.block(32, 8) == 32
    assert errors[1] < errors[0]


def test_experts_that_are_rounded_apart_share_the_mean_of_all() -> None:
    """Other bits for one expert change nothing for the others, for it counts in their shared part all the same."""
    grid = Grid(3, 8)
    apart = [Grid(2, 8), *[grid] * (first_layer("mixtral").experts.num_experts - 1)]
    together, alone = (quantize_layer(first_layer("mixtral"), grids, None)["gate_up_proj"] for grids in (grid, apart))
    assert all(torch.equal(one.values, other.values) for one, other in zip(together[1:], alone[1:], strict=True))
