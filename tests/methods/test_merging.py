"""Weights of the average against loops, and averages of experts against double precision."""

import pytest
import torch
from helpers import Expert, expert, relative_error, shuffled, swiglu, tensor, view_of

from hf_mcsmoe.methods.alignment import best_permutation
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.grouping import Groups
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.methods.weighting import WEIGHTING

GROUPS = Groups(expert_map=[0, 1, 0, 2, 1, 1], dominant=[2, 1, 3])
GATED = ("gate", "up", "down")

WEIGHTS = [  # method, saliency, weights
    ("saliency", [1, 2, 3, 5, 2, 4], [0.25, 0.25, 0.75, 1, 0.25, 0.5]),
    ("uniform", [1, 2, 3, 5, 2, 4], [0.5, 1 / 3, 0.5, 1, 1 / 3, 1 / 3]),
    ("dominant", [1, 2, 3, 5, 2, 4], [0, 1, 1, 1, 0, 0]),
    ("reversed", [1, 2, 3, 5, 1, 8], [19 / 36, 18 / 49, 17 / 36, 1, 19 / 49, 12 / 49]),
    ("fisher", [9, 9, 9, 9, 9, 9], [0.25, 0.5, 0.75, 1, 0.25, 0.25]),
    ("saliency", [0, 0, 3, 0, 0, 0], [0, 1 / 3, 1, 1, 1 / 3, 1 / 3]),
    ("saliency", [0, 0, 0, 0, 0, 0], [0.5, 1 / 3, 0.5, 1, 1 / 3, 1 / 3]),
    ("saliency", [1e-9, 1e-9, 3e-9, 1e-9, 1e-9, 2e-9], [0.25, 0.25, 0.75, 1, 0.25, 0.5]),
    ("saliency", [1e-300, 1e-300, 3e-300, 1e-300, 1e-300, 2e-300], [0.25, 0.25, 0.75, 1, 0.25, 0.5]),
]


@pytest.mark.parametrize(("method", "saliency", "expected"), WEIGHTS)
def test_weights_sum_to_one_in_each_group(method: str, saliency: list[float], expected: list[float]) -> None:
    found = WEIGHTING[method](view_of(num_experts=6, fisher=tensor([1, 2, 3, 9, 1, 1])), tensor(saliency), GROUPS)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", list(WEIGHTING))
def test_an_expert_alone_keeps_its_weights(method: str) -> None:
    alone = Groups(expert_map=[0, 1, 2], dominant=[0, 1, 2])
    view = view_of(num_experts=3, fisher=tensor([0, 2, 0]))
    assert WEIGHTING[method](view, tensor([0, 4, 0]), alone).tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", list(WEIGHTING))
def test_every_method_weights_each_group_by_one_in_all(method: str) -> None:
    view = view_of(num_experts=6, fisher=tensor([1, 0, 3, 0, 0, 0]))
    for saliency in ([1, 2, 3, 5, 2, 4], [0] * 6, [0, 0, 7, 0, 0, 0]):
        found = WEIGHTING[method](view, tensor(saliency), GROUPS)
        assert found.dtype == torch.float64
        assert found.min() >= 0
        sums = [sum(found[e] for e in range(6) if GROUPS.expert_map[e] == group) for group in range(3)]
        assert [float(total) for total in sums] == pytest.approx([1, 1, 1])
        assert torch.equal(WEIGHTING[method](view, tensor(saliency), GROUPS), found)


def test_random_weights_differ_by_the_seed() -> None:
    drawn = [WEIGHTING["random"](view_of(num_experts=6, seed=seed), tensor([1] * 6), GROUPS) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def _stack(experts: list[Expert], dtype: torch.dtype = torch.float32) -> Experts:
    return Experts({role: torch.stack([item[role] for item in experts]).to(dtype) for role in experts[0]}, swiglu)


def merge_group(
    weights: Experts, members: list[int], shares: list[float], orders: list[torch.Tensor | None]
) -> Expert:
    """Average a group of experts as a layer of them is averaged."""
    view = LayerView(view_of().sums, len(weights), 0, lambda: weights)
    return MERGING["average"](view, members, shares, orders)


def _mean(weights: Experts, shares: list[float], role: str) -> torch.Tensor:
    return sum(share * weights.tensors[role][member].double() for member, share in enumerate(shares))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_experts_are_averaged_to_the_rounding_floor(dtype: torch.dtype) -> None:
    weights = _stack([expert(GATED, 64, seed=seed) for seed in range(8)], dtype)
    shares = [0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]
    merged = merge_group(weights, list(range(8)), shares, [None] * 8)
    for role in GATED:
        exact = _mean(weights, shares, role)
        naive = torch.zeros_like(weights.tensors[role][0])
        for member, share in enumerate(shares):
            naive = naive + share * weights.tensors[role][member]
        floor = relative_error(exact.to(dtype), exact)
        assert merged[role].dtype == torch.float32
        assert relative_error(merged[role].to(dtype), exact) < 1.001 * floor
        assert relative_error(naive, exact) > 1.4 * floor, "or the test would not tell"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_wide_experts_are_averaged_in_their_own_precision(dtype: torch.dtype, bound: float) -> None:
    weights = _stack([expert(GATED, 16, seed=seed) for seed in range(3)], dtype)
    merged = merge_group(weights, [0, 1, 2], [0.5, 0.3, 0.2], [None] * 3)
    for role in GATED:
        assert merged[role].dtype == dtype
        assert relative_error(merged[role], _mean(weights, [0.5, 0.3, 0.2], role)) < bound


def test_the_sources_are_not_written_to() -> None:
    weights = _stack([expert(GATED, 4, seed=seed) for seed in range(3)])
    before = {role: value.clone() for role, value in weights.tensors.items()}
    for members, shares in (([1], [1.0]), ([0, 2], [1.0, 0.0]), ([0, 1, 2], [0.5, 0.25, 0.25])):
        merge_group(weights, members, shares, [None] * len(members))
    assert all(torch.equal(weights.tensors[role], value) for role, value in before.items())


@pytest.mark.parametrize("roles", [("up", "down"), GATED, ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")])
def test_shuffled_copies_merge_back_to_the_original(roles: tuple[str, ...]) -> None:
    original = expert(roles, 24)
    copies = [original, *(shuffled(original, seed=seed) for seed in range(1, 4))]
    orders = [None, *(best_permutation(original, copy) for copy in copies[1:])]
    merged = merge_group(_stack(copies), [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], orders)
    plain = merge_group(_stack(copies), [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], [None] * 4)
    assert all(relative_error(merged[role], value) < 1e-6 for role, value in original.items())
    assert relative_error(plain["up"], original["up"]) > 0.1


def test_members_of_weight_zero_leave_no_trace_even_if_they_hold_infinities() -> None:
    broken = {role: torch.full_like(value, torch.inf) for role, value in expert(GATED, 4).items()}
    weights = _stack([expert(GATED, 4), broken])
    merged = merge_group(weights, [0, 1], [1.0, 0.0], [None, torch.arange(4)])
    assert all(torch.equal(merged[role], value) for role, value in expert(GATED, 4).items())
