"""One candidate for each layer, so that all together cost least within some bytes: a knapsack of several choices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Steps that the bytes are counted in; a layer's bytes are rounded up to the next.
STEPS = 20_000


@dataclass(frozen=True)
class Candidate:
    """What a layer may become: its bytes, and the effect on the model in nats per position."""

    bytes: int
    effect: float


def cheapest(layers: Sequence[Sequence[Candidate]], limit: int) -> list[int] | None:
    """Return the number of a candidate for each layer, of least effect together within `limit` bytes; None for none.

    Exact up to the rounding of bytes (dynamic programming); of equal sums that with the first candidates. What the
    rounding leaves is then used layer by layer, by the largest gain.
    """
    kept = [_frontier(candidates) for candidates in layers]
    least = sum(candidates[numbers[0]].bytes for candidates, numbers in zip(layers, kept, strict=True))
    if least > limit:
        return None
    step = max(1, -(-limit // STEPS))
    chosen = _solved(layers, kept, limit // step, step)
    if chosen is None:  # only by the rounding of bytes
        chosen = [numbers[0] for numbers in kept]
    return _topped_up(layers, chosen, limit)


def _frontier(candidates: Sequence[Candidate]) -> list[int]:
    """Return the candidates that none of fewer or equal bytes and effect stands before, from the smallest on."""
    order = sorted(range(len(candidates)), key=lambda number: (candidates[number].bytes, candidates[number].effect))
    kept: list[int] = []
    for number in order:
        if not kept or candidates[number].effect < candidates[kept[-1]].effect:
            kept.append(number)
    return kept


def _solved(
    layers: Sequence[Sequence[Candidate]], kept: Sequence[list[int]], room: int, step: int
) -> list[int] | None:
    """Solve the knapsack over the kept candidates with `room` steps of bytes."""
    best = torch.zeros(room + 1, dtype=torch.float64)
    tables = []
    for candidates, numbers in zip(layers, kept, strict=True):
        reached = torch.full((len(numbers), room + 1), torch.inf, dtype=torch.float64)
        for row, number in zip(reached, numbers, strict=True):
            steps = -(-candidates[number].bytes // step)
            row[steps:] = best[: max(room + 1 - steps, 0)] + candidates[number].effect
        best, table = reached.min(0)
        tables.append(table)
    if not best[room].isfinite():
        return None
    chosen: list[int] = []
    for candidates, numbers, table in zip(reversed(layers), reversed(kept), reversed(tables), strict=True):
        number = numbers[int(table[room])]
        chosen.append(number)
        room -= -(-candidates[number].bytes // step)
    return chosen[::-1]


def _topped_up(layers: Sequence[Sequence[Candidate]], chosen: list[int], limit: int) -> list[int]:
    """Exchange candidates, one layer at a time, for those that gain most within what is left of the bytes."""
    while True:
        left = limit - sum(candidates[number].bytes for candidates, number in zip(layers, chosen, strict=True))
        gains = [
            (layers[layer][now].effect - candidate.effect, -layer, -number)
            for layer, now in enumerate(chosen)
            for number, candidate in enumerate(layers[layer])
            if candidate.bytes - layers[layer][now].bytes <= left
        ]
        gain, layer, number = max(gains)
        if gain <= 0:
            return chosen
        chosen[-layer] = -number
