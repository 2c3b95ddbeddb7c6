"""Budgets over the layers against a reference that hands out experts one by one, and groups against a plain loop."""

import itertools
import random
from fractions import Fraction

import oracle
import pytest
import torch
from helpers import tensor, view_of

from hf_mcsmoe.methods.budget import adaptive_budget, budget_total, salient_first, uniform_budget
from hf_mcsmoe.methods.grouping import dominant_groups


def _counts(case: int) -> tuple[list[list[int]], int, int]:
    """Make counts per layer, half of the cases full of ties, the experts to keep per layer, and the least of them."""
    generator = random.Random(case)
    sizes = [generator.randint(2, 6) for _ in range(generator.randint(1, 5))]
    largest = generator.choice([1, 2, 3, 1000])
    counts = [[generator.randint(0, largest) for _ in range(size)] for size in sizes]
    experts = generator.randint(1, min(sizes))
    return counts, experts, generator.randint(1, experts)


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_adaptive_budget_equals_handing_out_one_by_one(first: int) -> None:
    for case in range(first, first + 100):
        counts, experts, minimum = _counts(case)
        found = adaptive_budget([tensor(layer) for layer in counts], experts, minimum)
        assert found == oracle.budget(counts, experts * len(counts), minimum), case
        assert sum(found) == experts * len(counts)
        assert all(minimum <= kept <= len(layer) for kept, layer in zip(found, counts, strict=True))


@pytest.mark.parametrize("tokens", [3, 21, 49, 93, 1000, 12345])
def test_ties_between_layers_survive_the_division_by_tokens(tokens: int) -> None:
    """Frequencies are counts over tokens: 2 of 3 and 10 of 15 still tie, and the earlier layer wins."""
    for first, second, factor in itertools.product(range(2, 9), range(1, 8), range(2, 10)):
        counts = tensor([max(first, second), min(first, second)])
        assert adaptive_budget([counts / tokens, factor * counts / tokens], 0.75, 1) == [2, 1]
        assert adaptive_budget([factor * counts / tokens, counts / tokens], 0.75, 1) == [2, 1]


@pytest.mark.parametrize("case", range(20))
def test_adaptive_budget_keeps_the_largest_scaled_frequencies(case: int) -> None:
    counts, experts, _ = _counts(case)
    scaled = [[Fraction(value, max(max(layer), 1)) for value in layer] for layer in counts]

    def worth(kept: tuple[int, ...]) -> Fraction:
        return sum((sum(sorted(layer)[-k:], Fraction(0)) for layer, k in zip(scaled, kept, strict=True)), Fraction(0))

    choices = itertools.product(*(range(1, len(layer) + 1) for layer in counts))
    best = max(worth(kept) for kept in choices if sum(kept) == experts * len(counts))
    assert worth(tuple(adaptive_budget([tensor(layer) for layer in counts], experts, 1))) == best


TOTALS = [  # experts, sizes of the layers, total to keep
    (2, [8, 8, 8], 6),
    (1, [4, 4], 2),
    (0.5, [8, 8, 8], 12),
    (0.25, [8, 4], 3),
    (1.0, [8, 8], 16),
    (0.01, [8, 8, 8], 3),
    (0.3, [5, 5, 5], 4),
]


@pytest.mark.parametrize(("experts", "sizes", "total"), TOTALS)
def test_adaptive_budget_returns_exactly_the_requested_total(experts: float, sizes: list[int], total: int) -> None:
    assert budget_total(experts, sizes) == total
    for saliency in ([torch.ones(size) for size in sizes], [torch.zeros(size) for size in sizes]):
        found = adaptive_budget(saliency, experts, 1)
        assert sum(found) == total
        assert all(1 <= kept <= size for kept, size in zip(found, sizes, strict=True))


def test_a_starved_layer_keeps_min_experts_and_pays_for_no_more() -> None:
    even, starved = torch.ones(8), torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    assert [adaptive_budget([even, starved], 4, minimum) for minimum in (1, 2, 3)] == [[7, 1], [6, 2], [5, 3]]


UNIFORM = [(3, 1, [3, 3]), (2, 4, [4, 4]), (0.5, 1, [4, 2]), (0.125, 1, [1, 1]), (1.0, 1, [8, 4])]


@pytest.mark.parametrize(("experts", "minimum", "expected"), UNIFORM)
def test_uniform_budget_is_the_same_number_or_share_everywhere(
    experts: float, minimum: int, expected: list[int]
) -> None:
    assert uniform_budget([torch.rand(8), torch.rand(4)], experts, minimum) == expected


def test_salient_experts_come_first_and_ties_in_order() -> None:
    assert salient_first(tensor([1, 3, 0, 3, 1, 1])) == [1, 3, 0, 4, 5, 2]
    assert salient_first(torch.zeros(128)) == list(range(128))


@pytest.mark.parametrize("case", range(50))
def test_each_expert_joins_the_most_similar_dominant_one(case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    size = 3 + case % 10
    saliency = torch.randint(0, 5, (size,), generator=generator).double()
    similarity = torch.randint(-4, 5, (size, size), generator=generator).double()  # many ties, not symmetric
    number = 1 + case % size
    found = dominant_groups(view_of(num_experts=size), saliency, similarity, number)
    order = sorted(range(size), key=lambda expert: (-saliency[expert].item(), expert))
    dominant = sorted(order[:number])
    assert found.dominant == dominant
    for expert in range(size):
        best = max(dominant, key=lambda other: (other == expert, similarity[expert, other].item(), -other))
        assert dominant[found.expert_map[expert]] == (expert if expert in dominant else best)


def test_all_experts_kept_means_groups_of_one() -> None:
    found = dominant_groups(view_of(num_experts=3), tensor([2, 0, 1]), -torch.eye(3), 3)
    assert (found.expert_map, found.dominant) == ([0, 1, 2], [0, 1, 2])
