"""Every merging and alignment by its name, on copies and on planted units, and each formula computed another way."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Expert, expert, relative_error, shuffled, swiglu, view_of

from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.experts import Experts, permute
from hf_mcsmoe.methods.merging import MERGING, merge_group
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.sample import sample
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.methods.zipit import matched

D, F = 8, 6
ROLES = {
    "ungated": ("up", "down"),
    "gated": ("gate", "up", "down"),
    "gated, biased": ("gate", "gate_bias", "up", "up_bias", "down", "down_bias"),
}
# Merging within each member alone finds no unit of another that is the same.
MATCHING = [name for name in MERGING if name != "zipit_within"]
BY_UNIT = ["zipit", "repacking"]  # which need no order of the neurons


def _tokens(experts: int, number: int = 60, seed: int = 0) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(number, D, generator=generator)
    logits = torch.randn(number, experts, generator=generator)
    weights, index = logits.softmax(1).topk(min(2, experts))
    return Routed(logits, hidden, index, weights, experts, lambda: Experts({}, swiglu))


def _view(experts: list[Expert], routed: Routed | None = None, **sums: Any) -> LayerView:
    """Return a layer with a sample of tokens, and Fisher information of its units."""
    information = torch.rand(len(experts), len(experts[0]["up"]), generator=torch.Generator().manual_seed(5)).double()
    table = sample(routed or _tokens(len(experts)))
    return view_of(experts, **{"sample": table, "unit_fisher": information, **sums})


def _output(weights: Expert, hidden: torch.Tensor) -> torch.Tensor:
    up = hidden @ weights["up"].T + weights.get("up_bias", 0)
    gate = hidden @ weights["gate"].T + weights.get("gate_bias", 0) if "gate" in weights else None
    return swiglu(gate, up) @ weights["down"].T + weights.get("down_bias", 0)


def _elsewhere() -> torch.Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("method", MATCHING)
def test_copies_of_an_expert_merge_to_that_expert(method: str, roles: str) -> None:
    original = expert(ROLES[roles], F)
    view = _view([original] * 3, _tokens(3, 20))
    merged = merge_group(MERGING[method], view, [0, 1, 2], [0.5, 0.3, 0.2], [None] * 3)
    assert relative_error(_output(merged, _elsewhere()), _output(original, _elsewhere())) < 1e-4
    assert all(merged[role].shape == original[role].shape for role in original)


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("alignment", [name for name in ALIGNMENT if name != "none"])
def test_shuffled_copies_are_brought_back_and_merge_to_the_original(alignment: str, roles: str) -> None:
    original = expert(ROLES[roles], F)
    copies = [original, shuffled(original, seed=1), shuffled(original, seed=2)]
    view = _view(copies)
    orders = [None, *(ALIGNMENT[alignment](view, 0, other) for other in (1, 2))]
    for copy, order in zip(copies[1:], orders[1:], strict=True):
        assert all(torch.equal(permute(copy, order)[role], value) for role, value in original.items())
    for method in MATCHING:
        for given in (orders, [None] * 3) if method in BY_UNIT else (orders,):
            # The information of units is of those of each copy, in its own order.
            merged = merge_group(MERGING[method], view, [0, 1, 2], [0.5, 0.3, 0.2], given)
            assert relative_error(_output(merged, _elsewhere()), _output(original, _elsewhere())) < 1e-4, method


@pytest.mark.parametrize("method", list(MERGING))
def test_members_of_weight_zero_leave_no_trace_and_the_sources_stay(method: str) -> None:
    broken = {role: torch.full_like(value, torch.nan) for role, value in expert(ROLES["gated"], F).items()}
    experts = [expert(ROLES["gated"], F, seed=seed) for seed in range(2)]
    view = _view([*experts, broken])
    before = [{role: value.clone() for role, value in one.items()} for one in experts]
    alone = merge_group(MERGING[method], view, [0, 2], [1.0, 0.0], [None, None])
    assert all(torch.equal(alone[role], value) for role, value in experts[0].items())
    merged = merge_group(MERGING[method], view, [0, 1, 2], [0.5, 0.5, 0.0], [None] * 3)
    again = merge_group(MERGING[method], view, [0, 1], [0.5, 0.5], [None] * 2)
    for role in merged:
        assert merged[role].isfinite().all()
        assert torch.equal(merged[role], again[role])
        assert all(torch.equal(one[role], old[role]) for one, old in zip(experts, before, strict=True))


@pytest.mark.parametrize("method", BY_UNIT)
def test_units_that_are_the_same_are_merged_within_and_across_experts(method: str) -> None:
    """Two experts have F units in all, some of them twice: their mean is an expert of F units, exactly."""
    units = expert(ROLES["gated"], F)
    places = ([0, 0, 1, 2, 3, 3], [3, 4, 4, 5, 5, 2])
    experts = [
        {role: rows[places[k]] if role != "down" else rows[:, places[k]] for role, rows in units.items()}
        for k in range(2)
    ]
    merged = merge_group(MERGING[method], _view(experts), [0, 1], [0.7, 0.3], [None, None])
    wanted = 0.7 * _output(experts[0], _elsewhere()) + 0.3 * _output(experts[1], _elsewhere())
    assert relative_error(_output(merged, _elsewhere()), wanted) < 1e-4
    aligned = ALIGNMENT["weight_matching"](_view(experts), 0, 1)
    average = merge_group(MERGING["average"], _view(experts), [0, 1], [0.7, 0.3], [None, aligned])
    assert relative_error(_output(average, _elsewhere()), wanted) > 0.1, "or the test would not tell"


@pytest.mark.parametrize("seed", range(4))
def test_units_are_matched_greedily_by_correlation(seed: int) -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    start = torch.from_numpy(np.corrcoef(rows.numpy()))
    clusters = {number: [number] for number in range(9)}
    correlation = {(i, j): float(start[i, j]) for i, j in itertools.permutations(range(9), 2)}
    while len(clusters) > 4:
        i, j = sorted(max(correlation, key=lambda pair: correlation[pair]))
        clusters[i] += clusters.pop(j)
        for k in clusters:
            if k != i:
                correlation[i, k] = correlation[k, i] = min(correlation[i, k], correlation[j, k])
        correlation = {pair: value for pair, value in correlation.items() if j not in pair}
    expected = [next(place for place, key in enumerate(sorted(clusters)) if n in clusters[key]) for n in range(9)]
    assert matched(start.clone(), 4).tolist() == expected


def test_units_merge_within_their_member_alone_where_that_is_asked_for() -> None:
    """Each member has one unit twice: both keep what they are, side by side, by their weights."""
    units = expert(ROLES["gated"], 4)
    doubled = [[0, 1, 0, 1], [2, 3, 2, 3]]
    experts = [
        {role: rows[places] if role != "down" else rows[:, places] for role, rows in units.items()}
        for places in doubled
    ]
    merged = merge_group(MERGING["zipit_within"], _view(experts), [0, 1], [0.7, 0.3], [None, None])
    wanted = 0.7 * _output(experts[0], _elsewhere()) + 0.3 * _output(experts[1], _elsewhere())
    assert relative_error(_output(merged, _elsewhere()), wanted) < 1e-5


@pytest.mark.parametrize("roles", ROLES)
def test_regression_solves_the_least_squares_of_the_output_matrix(roles: str) -> None:
    experts = [expert(ROLES[roles], F, seed=seed) for seed in range(3)]
    view, shares = _view(experts), [0.5, 0.3, 0.2]
    merged = merge_group(MERGING["regression"], view, [0, 1, 2], shares, [None] * 3)
    average = merge_group(MERGING["average"], view, [0, 1, 2], shares, [None] * 3)
    inputs = view.sample.hidden
    target = sum(s * _output(one, inputs) for s, one in zip(shares, experts, strict=True))
    up = inputs @ average["up"].T + average.get("up_bias", 0)
    gate = inputs @ average["gate"].T + average.get("gate_bias", 0) if "gate" in average else None
    hidden, bias = swiglu(gate, up), average.get("down_bias", torch.zeros(D))
    expected = np.linalg.lstsq(hidden.double().numpy(), (target - bias).double().numpy(), rcond=None)[0].T
    assert relative_error(merged["down"], torch.from_numpy(expected)) < 1e-3
    assert all(torch.equal(merged[role], average[role]) for role in average if role != "down")


def test_regression_moves_nothing_that_few_tokens_do_not_tell() -> None:
    experts = [expert(ROLES["gated"], F, seed=seed) for seed in range(2)]
    view = _view(experts, _tokens(2, number=3))
    merged = merge_group(MERGING["regression"], view, [0, 1], [0.5, 0.5], [None, None])
    average = merge_group(MERGING["average"], view, [0, 1], [0.5, 0.5], [None, None])
    wanted = sum(0.5 * _output(one, view.sample.hidden) for one in experts)
    assert relative_error(_output(merged, view.sample.hidden), wanted) < 1e-2
    hidden = view.experts.hidden_of(average, view.sample.hidden)
    unseen = torch.linalg.svd(hidden).Vh[3:]  # directions of hidden states that no token has
    torch.testing.assert_close(merged["down"] @ unseen.T, average["down"] @ unseen.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [3, F, 12])
def test_the_common_directions_are_those_of_one_decomposition(width: int) -> None:
    experts = [expert(ROLES["gated"], width, seed=seed) for seed in range(3)]
    shares, order = [0.5, 0.3, 0.2], torch.randperm(width, generator=torch.Generator().manual_seed(1))
    merged = merge_group(MERGING["svd"], _view(experts), [0, 1, 2], shares, [None, None, order])
    experts[2] = permute(experts[2], order)
    for role in ("gate", "up", "down"):
        parts = [(one[role] if role == "down" else one[role].T).double() for one in experts]  # [D, F]
        left, values, right = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
        kept = min(width, D)
        mean = sum(share * part for share, part in zip(shares, right[:kept].split(width, 1), strict=True))
        found = left[:, :kept] @ torch.diag(values[:kept]) @ mean
        assert relative_error(merged[role] if role == "down" else merged[role].T, found) < 1e-5


@pytest.mark.parametrize("roles", ROLES)
def test_each_unit_is_weighted_by_its_own_information(roles: str) -> None:
    experts = [expert(ROLES[roles], F, seed=seed) for seed in range(2)]
    information = torch.rand(2, F, generator=torch.Generator().manual_seed(1)).double()
    information[:, 2] = 0
    order = torch.randperm(F, generator=torch.Generator().manual_seed(2))
    view = _view(experts, unit_fisher=information)
    merged = merge_group(MERGING["fisher"], view, [0, 1], [0.8, 0.2], [None, order.argsort()])
    unaligned = permute(experts[1], order.argsort())
    for role in experts[0]:
        for unit in range(F):
            one, other = float(information[0, unit]), float(information[1, order.argsort()[unit]])
            share = one / (one + other) if one + other else 0.8
            at = (slice(None), unit) if role == "down" else unit
            if role == "down_bias":
                at, share = slice(None), 0.8
            wanted = share * experts[0][role][at] + (1 - share) * unaligned[role][at]
            torch.testing.assert_close(merged[role][at], wanted)


@pytest.mark.parametrize("seed", range(3))
def test_activation_matching_is_the_best_of_all_permutations(seed: int) -> None:
    experts = [expert(ROLES["gated"], 4, seed=seed + other) for other in (0, 10, 20, 30)]
    routed = _tokens(4, 120, seed)
    view = _view(experts, routed)
    found = ALIGNMENT["activation_matching"](view, 1, 3).tolist()
    either = ((routed.index == 1) | (routed.index == 3)).any(1)
    assert 32 <= int(either.sum()) < 120
    one, other = (
        swiglu(routed.hidden[either] @ e["gate"].T, routed.hidden[either] @ e["up"].T).numpy()
        for e in (experts[1], experts[3])
    )
    correlation = np.corrcoef(one.T, other.T)[:4, 4:]
    gains = {order: sum(correlation[j, order[j]] for j in range(4)) for order in itertools.permutations(range(4))}
    assert tuple(found) == max(gains, key=lambda order: gains[order])


def test_where_few_tokens_reached_two_experts_all_of_the_sample_tell() -> None:
    experts = [expert(ROLES["gated"], 4, seed=seed) for seed in range(3)]
    routed = _tokens(3, 60)
    routed.index[:] = torch.tensor([2, 2])
    one = {name: ALIGNMENT["activation_matching"](_view(experts, routed), 0, 1).tolist() for name in ("few",)}
    routed.index[:] = torch.tensor([0, 1])
    assert ALIGNMENT["activation_matching"](_view(experts, routed), 0, 1).tolist() == one["few"]


@pytest.mark.parametrize("seed", range(3))
def test_activation_and_weight_matching_has_the_smallest_sum_of_distances(seed: int) -> None:
    experts = [expert(ROLES["gated, biased"], 4, seed=seed + other) for other in (0, 10)]
    view = _view(experts)
    found = ALIGNMENT["activation_weight_matching"](view, 0, 1).tolist()
    units = []
    for number, one in enumerate(experts):
        states = view.experts.hidden(number, view.sample.hidden).T
        weights = torch.cat([one["gate"], one["up"], one["down"].T], 1)
        units.append((states / states.norm(dim=1)[:, None], weights / weights.norm(dim=1)[:, None]))

    def cost(order: tuple[int, ...]) -> float:
        return sum(float((units[0][k][j] - units[1][k][order[j]]).norm()) for j in range(4) for k in (0, 1))

    assert tuple(found) == min(itertools.permutations(range(4)), key=cost)
