"""How many experts a method keeps for a size: the most whose weight files take no more bytes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hf_mcsmoe.forecast.result import choice_by_hand, constant_bytes
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.budget import BUDGET, uniform_budget
from hf_mcsmoe.methods.choice import Choice
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.search.choices import choice_bytes, fixed_bytes
from hf_mcsmoe.search.size import bytes_text


def experts_within(layers: Layers, options: Mapping[str, Any], limit: int, told: str) -> int | float:
    """Return the most experts that a method can keep within `limit` bytes: a number in each layer, or a share.

    From shapes alone, and exact where all layers have experts of one size.

    Args:
        options: keyword arguments of `compress`; of its `config` the number of experts does not count.
        told: the size as it was asked for, for an error.

    Raises:
        ValueError: even the fewest take more, or all of them take less.
    """
    config: MergeConfig = options["config"]
    groups = layers.selected(config.skip).tied
    sizes = [shared[0].num_experts for shared in groups]
    room = limit - fixed_bytes(layers, config.skip)

    def taken(counts: Sequence[int]) -> int:
        pairs = zip(groups, counts, strict=True)
        return sum(
            choice_bytes(shared[0], _choice_of(shared[0], count, options)) + constant_bytes(shared[0], count, config)
            for shared, count in pairs
        )

    unit, least = _limits(layers, groups, config)
    is_uniform = BUDGET[config.budget] is uniform_budget and len(set(sizes)) == 1
    totals = range(max(sizes), 0, -unit) if is_uniform else range(sum(sizes), 0, -unit)
    spread = [[min(total, size) for size in sizes] if is_uniform else _spread(total, sizes) for total in totals]
    fits = next((place for place, counts in enumerate(spread) if taken(counts) <= room), None)
    fewest = taken([least] * len(sizes)) + limit - room
    if fits is None or fewest > limit:
        raise ValueError(f"size={told!r} is {bytes_text(limit)}, and the fewest experts take {bytes_text(fewest)}.")
    return totals[fits] if is_uniform else totals[fits] / sum(sizes)


def _limits(layers: Layers, groups: Sequence[Sequence[MoELayer]], config: MergeConfig) -> tuple[int, int]:
    """Return the step of the number of experts of a layer, and the fewest that it can keep."""
    if config.reduce != "prune" or not config.cuts_router:
        return 1, config.min_experts
    found = [cut_limits(layers.model, layer.name) for shared in groups for layer in shared]
    return max(unit for _, unit in found), max(config.min_experts, *(least for least, _ in found))


def _spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Return so many experts shared out over layers by their sizes; the layers of largest experts are not known."""
    whole = sum(sizes)
    edges = [round(total * sum(sizes[:place]) / whole) for place in range(len(sizes) + 1)]
    return [max(1, stop - start) for start, stop in pairwise(edges)]


def _choice_of(layer: MoELayer, count: int, options: Mapping[str, Any]) -> Choice:
    """Return what becomes of a layer with so many experts."""
    stored = {name: options.get(name) for name in ("quantization", "low_rank")}
    return choice_by_hand(layer, count, options["config"].reduce, **stored)


def bytes_with(layers: Layers, options: Mapping[str, Any], experts: int | float) -> int:
    """Return the bytes of the weight files with so many experts in each layer, or such a share of them."""
    firsts = [shared[0] for shared in layers.tied]
    counts = [experts if isinstance(experts, int) else round(experts * layer.num_experts) for layer in firsts]
    pairs = zip(firsts, counts, strict=True)
    return fixed_bytes(layers) + sum(choice_bytes(x, _choice_of(x, max(1, count), options)) for x, count in pairs)
