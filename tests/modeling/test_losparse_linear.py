"""`LoSparseLinear` in place of `nn.Linear`: made in one call, exact at the start, the same when compact."""

import copy
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import nn

from hf_mcsmoe import LoSparseLinear, compact
from hf_mcsmoe.low_rank.decompose import compact_weight
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts

SHAPES = [(5, 6), (2, 3, 6), (6,), (0, 6), (2, 0, 6)]


def test_pruned_rows_get_no_gradient_and_no_say() -> None:
    layer = LoSparseLinear.from_linear(nn.Linear(6, 4), torch.ones(4, 1), torch.ones(1, 6))
    layer.weight_kept[1] = False
    states = torch.randn(2, 3, 6)
    dense = layer.weight_u @ layer.weight_v + layer.weight_s.masked_fill(~layer.weight_kept[:, None], 0)
    torch.testing.assert_close(layer(states), states @ dense.T + layer.bias)
    layer(states).square().sum().backward()
    assert not layer.weight_s.grad[1].any()
    assert layer.weight_s.grad[0].any()


@pytest.mark.parametrize("kept_rows", [0, 2])
def test_a_linear_layer_in_the_compact_form(kept_rows: int) -> None:
    linear = nn.Linear(6, 4)
    layer = LoSparseLinear.from_linear(linear, torch.randn(4, 2), torch.randn(2, 6))
    states = torch.randn(5, 6)
    torch.testing.assert_close(layer(states), linear(states))
    layer.weight_kept[kept_rows:] = False
    expected = layer(states)
    compact_weight(layer, "weight", layer.weight_kept)
    torch.testing.assert_close(layer(states), expected)
    assert layer.weight_s.shape == (kept_rows, 6)
    layer(states).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["training", "compact", "no_rows"])
def test_all_shapes_of_inputs(form: str, shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(6, 4, bias=bias)
    layer = LoSparseLinear.from_linear(linear, rank=2)
    states = torch.randn(shape)
    if form == "training":
        torch.testing.assert_close(layer(states), linear(states))
    layer.weight_kept[0 if form == "no_rows" else 2 :] = False
    rows = layer.weight_s * layer.weight_kept[:, None]
    expected = nn.functional.linear(states, layer.weight_u @ layer.weight_v + rows, layer.bias)
    if form != "training":
        compact(layer)
    output = layer(states)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert layer.weight_u.grad.shape == layer.weight_u.shape


@pytest.mark.parametrize("form", ["training", "compact"])
def test_bfloat16(form: str) -> None:
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    layer = LoSparseLinear.from_linear(linear, rank=8)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    if form == "compact":
        compact(layer)
    states = torch.randn(10, 64).bfloat16()
    assert layer(states).dtype == torch.bfloat16
    assert relative_error(layer(states).detach(), linear(states).detach()) < 0.02


def test_the_factors_are_the_nearest_product_and_with_a_moment_that_on_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 20)
    states = torch.randn(500, 12, generator=generator) * torch.logspace(1, -2, 12)
    moment = states.T.double() @ states.double() / len(states) + 1e-6 * torch.eye(12)
    errors = {}
    for name, options in {"plain": {}, "weighted": {"moment": moment}}.items():
        layer = LoSparseLinear.from_linear(linear, rank=4, **options)
        missing = (linear.weight - layer.weight_u @ layer.weight_v).detach().double()
        errors[name] = (float(missing.norm()), float((states.double() @ missing.T).norm()))
    weight = linear.weight.detach().double()
    best = torch.linalg.eigvalsh(weight.T @ weight)[:-4].sum().sqrt()
    best_outputs = torch.linalg.eigvalsh(weight @ (states.T.double() @ states.double()) @ weight.T)[:-4].sum().sqrt()
    assert errors["plain"][0] == pytest.approx(float(best), rel=1e-4)
    assert errors["weighted"][1] == pytest.approx(float(best_outputs), rel=1e-2)
    assert errors["weighted"][1] < errors["plain"][1]


class _Network(nn.Module):
    """A model that knows nothing of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [..., 6] to [..., 3]."""
        return self.head(self.body(states))


def test_layers_of_any_module_become_compact() -> None:
    model, states = _Network(), torch.randn(4, 6)
    expected = model(states)
    model.body[2] = LoSparseLinear.from_linear(model.body[2], rank=3)
    torch.testing.assert_close(model(states), expected)
    (part,) = sparse_parts(model).values()
    part.kept[4:] = False
    pruned = model(states)
    assert compact(model) is model
    torch.testing.assert_close(model(states), pruned)
    assert model.body[2].weight_s.shape == (4, 16)
    again = _Network()
    again.body[2] = LoSparseLinear(16, 16, rank=3, kept_rows=4)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(states), pruned)
    with pytest.raises(ValueError, match="no low rank"):
        compact(copy.deepcopy(model))


def test_any_module_is_pruned_to_a_share_on_request() -> None:
    model = _Network()
    model.body[2] = LoSparseLinear.from_linear(model.body[2], rank=3)
    strongest = model.body[2].weight_s.detach().abs().mean(-1).topk(4).indices.sort().values
    with pytest.warns(UserWarning, match="100% of the rows of S are still kept, 25% are to remain"):
        compact(model, keep=0.25)
    assert model.body[2].weight_rows.tolist() == strongest.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give either rank"),
        ({"rank": 2, "u": torch.ones(4, 2), "v": torch.ones(2, 6)}, "Give either rank"),
        ({"u": torch.ones(4, 2)}, "Give either rank"),
        ({"rank": 5}, "rank=5 must be from 1 to 4 for a layer of 4 x 6"),
        ({"rank": 0}, "rank=0 must be from 1 to 4"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoSparseLinear.from_linear(nn.Linear(6, 4), **options)
    with pytest.raises(ValueError, match="keep=2 must be a share"):
        compact(LoSparseLinear.from_linear(nn.Linear(6, 4), rank=2), keep=2)
