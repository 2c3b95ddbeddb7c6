"""Weight matching against all permutations of few neurons, in every layout of an expert."""

import itertools

import pytest
import torch
from helpers import Expert, expert, shuffled, view_of

from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.experts import permute

ROLES = {
    "ungated": ("up", "down"),
    "gated": ("gate", "up", "down"),
    "ungated, biased": ("up", "up_bias", "down", "down_bias"),
    "gated, biased": ("gate", "gate_bias", "up", "up_bias", "down", "down_bias"),
}


def weight_matching(reference: Expert, other: Expert) -> torch.Tensor:
    """Align two experts as a layer of them is aligned."""
    return ALIGNMENT["weight_matching"](view_of([other, reference]), 1, 0)


def _gain(reference: Expert, other: Expert, order: tuple[int, ...]) -> float:
    """Return the inner product of all weights that belong to a neuron, neuron `order[j]` in the place of neuron j."""
    total = 0.0
    for role in reference:
        for place, neuron in enumerate(order):
            if role == "down":
                total += float(reference[role][:, place].double() @ other[role][:, neuron].double())
            elif role in ("gate", "up"):
                total += float(reference[role][place].double() @ other[role][neuron].double())
            elif role in ("gate_bias", "up_bias"):
                total += float(reference[role][place].double() * other[role][neuron].double())
    return total


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_weight_matching_is_the_best_of_all_permutations(roles: str, width: int) -> None:
    for seed in range(4):
        reference, other = expert(ROLES[roles], width, seed=seed), expert(ROLES[roles], width, seed=seed + 100)
        found = tuple(weight_matching(reference, other).tolist())
        best = max(itertools.permutations(range(width)), key=lambda order: _gain(reference, other, order))
        assert sorted(found) == list(range(width))
        assert _gain(reference, other, found) == pytest.approx(_gain(reference, other, best), rel=1e-5, abs=1e-5)


def test_weight_matching_is_the_best_of_all_permutations_of_six_neurons() -> None:
    reference, other = expert(ROLES["gated, biased"], 6), expert(ROLES["gated, biased"], 6, seed=1)
    best = max(itertools.permutations(range(6)), key=lambda order: _gain(reference, other, order))
    assert tuple(weight_matching(reference, other).tolist()) == best


@pytest.mark.parametrize("role", ["up", "gate", "down", "up_bias", "gate_bias"])
def test_every_tensor_of_a_neuron_is_in_the_cost(role: str) -> None:
    """All neurons are alike but for one tensor, which alone can tell their order."""
    roles = ROLES["gated, biased"]
    reference = {name: torch.ones_like(value) for name, value in expert(roles, 8).items()}
    reference[role] = expert(roles, 8)[role]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    other = permute(reference, order)
    assert torch.equal(weight_matching(reference, other), order.argsort())


@pytest.mark.parametrize("roles", ROLES)
def test_permute_keeps_the_function_and_a_shuffled_copy_is_brought_back_exactly(roles: str) -> None:
    original = expert(ROLES[roles], 33)
    copy = shuffled(original, seed=3)
    assert not torch.equal(copy["up"], original["up"])
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(_output(copy, hidden), _output(original, hidden))
    back = permute(copy, weight_matching(original, copy))
    assert all(torch.equal(back[role], tensor) for role, tensor in original.items())


def _output(weights: Expert, hidden: torch.Tensor) -> torch.Tensor:
    wide = {role: tensor.double() for role, tensor in weights.items()}
    up = hidden @ wide["up"].T + wide.get("up_bias", 0)
    gate = hidden @ wide["gate"].T + wide.get("gate_bias", 0) if "gate" in wide else up
    inner = gate.sigmoid() * up
    return inner @ wide["down"].T + wide.get("down_bias", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gives_the_permutation_of_its_values(dtype: torch.dtype) -> None:
    original = {role: tensor.to(dtype) for role, tensor in expert(ROLES["gated"], 16).items()}
    back = permute(shuffled(original, seed=1), weight_matching(original, shuffled(original, seed=1)))
    assert all(torch.equal(back[role], tensor) for role, tensor in original.items())


def test_none_leaves_the_neurons_in_place() -> None:
    assert ALIGNMENT["none"](view_of([expert(ROLES["gated"], 4), expert(ROLES["gated"], 4, seed=1)]), 0, 1) is None
