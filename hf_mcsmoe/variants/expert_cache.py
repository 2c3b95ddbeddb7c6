"""A cache of experts with policies of eviction, and a simulation of what it loads (HOBBIT's sequence level).

Source: Tang and others, HOBBIT (arXiv 2411.01433), section 3.4.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.variants.mixed_precision_mcsmoe import choose_precision

Value = TypeVar("Value")
# Layer and expert.
Key = tuple[int, int]


@dataclass
class Use:
    """What is known of an expert in a sequence: its last step, how often it was used, and in high precision."""

    last: int = 0
    uses: int = 0
    high: int = 0


@dataclass(frozen=True)
class Moment:
    """When an eviction is decided: steps of the sequence so far, the layer that is computed, and the layers."""

    step: int
    layer: int
    num_layers: int


# Of an expert, the one with the least goes.
Priority = Callable[[Key, Use, Moment], float]


def lru(key: Key, use: Use, moment: Moment) -> float:
    """Return when an expert was used last."""
    return use.last


def lfu(key: Key, use: Use, moment: Moment) -> float:
    """Return how often an expert was used."""
    return use.uses


def hobbit(weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)) -> Priority:
    """Return the policy that weighs last use, uses, uses in high precision, and how soon the layer comes again.

    Args:
        weights: of the four, which sum to 1.

    Raises:
        ValueError: a weight is negative, or they do not sum to 1.
    """
    if not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
        raise ValueError(f"The four weights must be 0 or more and sum to 1, not {weights}.")

    def priority(key: Key, use: Use, moment: Moment) -> float:
        steps, layers = max(moment.step, 1), moment.num_layers
        near = 1 - (key[0] - moment.layer + layers) % layers / layers
        terms = (use.last / steps, use.uses / steps, use.high / steps, near)
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    return priority


class ExpertCache(Generic[Value]):
    """Keeps up to so many experts; what one call asks for is never evicted for another expert of the same call."""

    def __init__(self, capacity: int, priority: Priority, num_layers: int) -> None:
        """Take the number of experts to keep, and the policy.

        Raises:
            ValueError: the capacity is negative, or there are no layers.
        """
        if not (capacity >= 0 and num_layers >= 1):
            raise ValueError(f"Needs capacity >= 0 and num_layers >= 1, not {capacity} and {num_layers}.")
        self.capacity, self.priority, self.num_layers = capacity, priority, num_layers
        self.kept: dict[Key, Value] = {}
        self.known: dict[Key, Use] = {}
        self.misses, self.step = 0, 0

    def reset(self) -> None:
        """Forget what is known of uses, at the begin of a sequence; what is kept stays."""
        self.known, self.step = {}, 0

    def tell(self, key: Key, *, is_high: bool) -> None:
        """Count a use of an expert in the step that is computed."""
        use = self.known.setdefault(key, Use())
        use.last, use.uses, use.high = self.step, use.uses + 1, use.high + is_high

    def fetch(self, keys: Iterable[Key], load: Callable[[Key], Value]) -> dict[Key, Value]:
        """Return the experts of one layer's call; those that are not kept are loaded.

        Where they are more than can be kept, all are returned nevertheless, and the last ones are not kept.
        """
        wanted = list(dict.fromkeys(keys))
        values = {key: self.kept[key] for key in wanted if key in self.kept}
        for key in wanted:
            if key not in values:
                values[key] = load(key)
                self.misses += 1
                self._keep(key, values[key], set(wanted))
        return values

    def _keep(self, key: Key, value: Value, pinned: set[Key]) -> None:
        if len(self.kept) >= self.capacity:
            moment = Moment(self.step, key[0], self.num_layers)
            free = [other for other in self.kept if other not in pinned]
            if not free:
                return
            del self.kept[min(free, key=lambda other: self.priority(other, self.known.get(other, Use()), moment))]
        self.kept[key] = value


@dataclass(frozen=True)
class Trace:
    """Picks of a sequence: per layer the experts, int [T, K], and their weights, [T, K]."""

    index: list[torch.Tensor]
    weights: list[torch.Tensor] = field(repr=False)


@torch.no_grad()
def record_trace(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Trace:
    """Return the picks of every layer of stacked experts for a sequence.

    Args:
        batch: what the model is called with; its tokens are taken in their order.

    Raises:
        ValueError: the model has no experts of the library's stacked layout.
    """
    index: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def record(module: Any, args: Sequence[Any]) -> None:
        index.append(args[1].cpu())
        weights.append(args[2].float().cpu())

    found = [module for module in model.modules() if {"is_transposed", "has_gate"} <= vars(module).keys()]
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts of the library's stacked layout.")
    hooks = [module.register_forward_pre_hook(record) for module in found]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(index, weights)


def simulate(
    traces: Sequence[Trace],
    priority: Priority,
    *,
    high: int,
    low: int = 0,
    t1: float = 1.0,
    t2: float = 1.0,
    low_cost: float = 0.25,
) -> float:
    """Return what a token costs to load, in experts of high precision, with caches for `high` and `low` experts.

    An expert that is kept in high precision is used so; of the others, `choose_precision` tells what is loaded.

    Args:
        traces: sequences, computed one after the other, token by token.
        low_cost: bytes of an expert in low precision over those in high precision.

    Raises:
        ValueError: no token to compute.
    """
    tokens = sum(len(trace.index[0]) for trace in traces)
    if not tokens:
        raise ValueError("simulate needs traces of one token or more.")
    caches: list[ExpertCache[None]] = [ExpertCache(size, priority, len(traces[0].index)) for size in (high, low)]
    for trace in traces:
        for cache in caches:
            cache.reset()
        for picks in _steps(trace, t1, t2):
            _compute(caches, picks)
    return (caches[0].misses + low_cost * caches[1].misses) / tokens


def _steps(trace: Trace, t1: float, t2: float) -> Iterator[list[tuple[list[Key], list[Key]]]]:
    """Yield token by token, for each layer, the experts to be had in high and those to be had in low precision."""
    chosen = [choose_precision(weights, t1, t2) for weights in trace.weights]
    for token in range(len(trace.index[0])):
        yield [
            tuple([(layer, int(expert)) for expert in index[token][mask[token]]] for mask in masks)
            for layer, (index, masks) in enumerate(zip(trace.index, chosen, strict=True))
        ]


def _compute(caches: Sequence[ExpertCache[None]], picks: Sequence[tuple[list[Key], list[Key]]]) -> None:
    """Go through the layers of one token."""
    high, low = caches
    for cache in caches:
        cache.step += 1
    for wanted, lesser in picks:
        better = [key for key in lesser if key in high.kept]
        for cache, keys in ((high, [*wanted, *better]), (low, [key for key in lesser if key not in better])):
            for key in keys:
                cache.tell(key, is_high=key in wanted)
            cache.fetch(keys, lambda key: None)
