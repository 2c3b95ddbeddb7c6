"""The knapsack against all combinations."""

import itertools
import random

import pytest

from hf_mcsmoe.search.knapsack import Candidate, cheapest


def random_layers(seed: int, layers: int = 4, candidates: int = 6) -> list[list[Candidate]]:
    """Make candidates whose effect falls, on the whole, with their bytes."""
    draw = random.Random(seed)
    return [
        [Candidate(size := draw.randint(10, 1000), draw.random() * 100 / size) for _ in range(candidates)]
        for _ in range(layers)
    ]


def best_of_all(layers: list[list[Candidate]], limit: int) -> float | None:
    """Return the least effect of all combinations within a limit."""
    fits = [item for item in itertools.product(*layers) if sum(candidate.bytes for candidate in item) <= limit]
    return min((sum(candidate.effect for candidate in item) for item in fits), default=None)


@pytest.mark.parametrize("seed", range(8))
def test_no_combination_within_the_bytes_is_better(seed: int) -> None:
    layers = random_layers(seed)
    for limit in (600, 1200, 2000, 4000):
        chosen, expected = cheapest(layers, limit), best_of_all(layers, limit)
        if chosen is None:
            assert expected is None
            continue
        taken = [candidates[number] for candidates, number in zip(layers, chosen, strict=True)]
        assert sum(candidate.bytes for candidate in taken) <= limit
        assert sum(candidate.effect for candidate in taken) == pytest.approx(expected)


def test_where_bytes_are_rounded_what_is_left_is_used_and_never_more() -> None:
    layers = [[Candidate(item.bytes * 99_991, item.effect) for item in layer] for layer in random_layers(3)]
    least = sum(min(item.bytes for item in layer) for layer in layers)
    for limit in (least, least + 1, 2 * least):
        chosen = cheapest(layers, limit)
        assert chosen is not None
        taken = [candidates[number] for candidates, number in zip(layers, chosen, strict=True)]
        assert sum(item.bytes for item in taken) <= limit
        expected = best_of_all(layers, limit)
        assert expected is not None
        assert sum(item.effect for item in taken) <= expected * 1.01


def test_ties_go_to_the_first_candidate() -> None:
    assert cheapest([[Candidate(5, 1.0), Candidate(5, 1.0), Candidate(4, 1.0)]] * 2, 10) == [2, 2]
    assert cheapest([[Candidate(5, 1.0), Candidate(5, 1.0)]] * 2, 10) == [0, 0]


def test_what_cannot_be_reached_is_none() -> None:
    assert cheapest([[Candidate(5, 1.0)], [Candidate(7, 1.0)]], 11) is None
