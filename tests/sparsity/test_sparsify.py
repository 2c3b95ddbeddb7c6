"""Experts with weights or hidden units left out, in every layout, and the checkpoints that hold them."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits
from layouts import LAYOUTS
from transformers import AutoModelForCausalLM

from hf_mcsmoe import moe_layers
from hf_mcsmoe.methods.experts import Expert
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import sparsify_experts

# Families whose configuration has no width of the experts alone.
FIXED = ("aria", "switch_transformers", "llama4", "dbrx")
QUICK = ("mixtral", "gpt_oss", "jetmoe")


def _cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def _experts(model: torch.nn.Module) -> list[Expert]:
    return [layer.read().expert(index) for layer in moe_layers(model) for index in range(layer.num_experts)]


@pytest.mark.parametrize("name", _cases(LAYOUTS))
def test_half_of_each_row_is_zero_in_every_layout_and_nothing_else_changes(name: str) -> None:
    model = build(name)
    sparse = sparsify_experts(copy.deepcopy(model), batches(name, model), SparsityConfig())
    for before, after in zip(_experts(model), _experts(sparse), strict=True):
        for role, weights in before.items():
            stays = after[role] != 0
            assert torch.equal(after[role][stays], weights[stays])
            if role in ("gate", "up", "down"):
                assert (stays.sum(1) == weights.shape[1] // 2).all()
            else:
                assert torch.equal(after[role], weights)
    inside = {f"{layer.name}." for layer in moe_layers(model)}
    rest = [key for key in model.state_dict() if not any(key.startswith(prefix) for prefix in inside)]
    assert all(torch.equal(model.state_dict()[key], sparse.state_dict()[key]) for key in rest)


@pytest.mark.parametrize("name", _cases(name for name in LAYOUTS if name not in FIXED))
def test_hidden_units_that_give_nothing_can_go_without_a_change(name: str) -> None:
    model = build(name)
    for layer in moe_layers(model):
        for index in range(layer.num_experts):
            expert = layer.read().expert(index)
            expert["down"][:, 1::2] = 0
            for role in ("gate", "up"):
                if role in expert:
                    expert[role][1::2] *= 1e-3  # so that they score least
    data = batches(name, model)
    narrow = sparsify_experts(copy.deepcopy(model), data, SparsityConfig(pattern="units"))
    assert all(layer.intermediate_size == 12 for layer in moe_layers(narrow))
    for batch in data:
        torch.testing.assert_close(logits(narrow, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_narrower_model_is_a_plain_checkpoint_of_its_family(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    data, size = batches("qwen3_moe", model), sum(value.numel() for value in model.parameters())
    narrow = sparsify_experts(model, data, SparsityConfig(pattern="units", share=0.5))
    narrow.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.moe_intermediate_size == 12
    assert torch.equal(logits(loaded, data[0]), logits(narrow, data[0]))
    experts = sum(layer.num_parameters for layer in moe_layers(loaded))
    assert sum(value.numel() for value in loaded.parameters()) == size - experts


@pytest.mark.parametrize("name", _cases(FIXED))
def test_a_family_without_a_width_of_experts_alone_is_refused_before_anything_changes(name: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="has no key for the width of its experts alone"):
        sparsify_experts(model, batches(name, model), SparsityConfig(pattern="units"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": 1.0}, r"share=1\.0 must be between 0 and 1"),
        ({"score": "wandas"}, "Did you mean 'wanda'"),
        ({"pattern": "unit"}, "Did you mean 'units'"),
        ({"pattern": "2:4", "share": 0.6}, "does not go with the pattern 2:4"),
        ({"pattern": "units", "skip": "layers.0"}, "one width for all experts"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SparsityConfig(**options)


def test_scores_that_read_data_ask_for_it() -> None:
    model = build("mixtral")
    with pytest.raises(ValueError, match="reads inputs_squared and units_squared, of calibration data"):
        sparsify_experts(model, None, SparsityConfig(score="wanda"))
    sparsify_experts(model, None, SparsityConfig(score="magnitude", pattern="2:4"))
    assert all((expert["up"].unflatten(1, (-1, 4)) == 0).sum(2).eq(2).all() for expert in _experts(model))
