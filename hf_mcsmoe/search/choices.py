"""What each layer may become, what that takes in bytes, and the choice of least effect for the bytes there are."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.ranks import stored_share
from hf_mcsmoe.methods.choice import Choice, Grid
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.quantization.codes import group_size_for
from hf_mcsmoe.quantization.packing import expert_bytes
from hf_mcsmoe.search.config import MODEL, NOTHING, SizeConfig
from hf_mcsmoe.search.knapsack import Candidate, cheapest
from hf_mcsmoe.search.size import bytes_text

# Steps that the experts of a layer are counted in.
STEPS = 16
# Parts of the smaller side of a matrix that its ranks may be, unless others are asked for.
RANKS = (8, 16)
# Bytes of the header of a file of weights, for each tensor that it holds, and the tensors that two matrices of a layer
# may become more: words, scales and zero points each, of U, V and S (and the places of its rows) where it is low rank.
HEADER, MORE, MORE_OF_FACTORS = 150, 4, 18


@dataclass(frozen=True)
class Chosen:
    """What is to become of each layer, by name (of those that share experts the first); `bytes` of the weight files.

    `predicted` effect in nats per position, by layer; empty where no curves were given.
    """

    choices: dict[str, Choice]
    bytes: int
    predicted: dict[str, float]


def choose(
    layers: Layers, curves: Mapping[str, LayerCurves], config: SizeConfig, limit: int, skip: Sequence[str] = ()
) -> Chosen:
    """Return the choice of least predicted effect whose weight files take at most `limit` bytes.

    Raises:
        ValueError: the size cannot be reached; the message says which is the smallest.
    """
    check_reachable(layers, config, limit, skip)
    groups = layers.selected(skip).tied
    options = [_measured(shared, curves[shared[0].name], config) for shared in groups]
    room = limit - fixed_bytes(layers, skip)
    found = [solved for part in _parts(options, config) if (solved := _solved(groups, curves, part, room))]
    if not found:
        raise ValueError(
            f"size={config.size!r} is {bytes_text(limit)} for this model, and no choice that could be measured is so "
            "small (experts of some routers cannot be pruned, or layers have no count in common): ask for more, or "
            "allow fewer bits, reduce='auto' or other counts in other layers."
        )
    best = min(found, key=lambda chosen: sum(chosen.predicted.values()))
    return replace(best, bytes=best.bytes + fixed_bytes(layers, skip))


def _parts(options: Sequence[Sequence[Choice]], config: SizeConfig) -> Iterator[list[list[Choice]]]:
    """Yield the choices of all layers that may go together: those of one count, or one grid, where all have the same.

    Parts in which a layer has no choice are left out.
    """

    def common(choice: Choice) -> tuple[int, Grid | None]:
        return (
            choice.experts if config.uniform_experts else 0,
            choice.w_in if config.alike == MODEL else None,
        )

    for wanted in sorted(dict.fromkeys(map(common, options[0])), key=lambda kind: kind[0]):
        kept = [[choice for choice in choices if common(choice) == wanted] for choices in options]
        if all(kept):
            yield kept


def _solved(
    groups: Sequence[Sequence[MoELayer]],
    curves: Mapping[str, LayerCurves],
    kept: Sequence[Sequence[Choice]],
    room: int,
) -> Chosen | None:
    """Solve the knapsack over the choices of each layer; None where nothing fits."""
    names = [shared[0].name for shared in groups]
    tables = []
    for shared, own in zip(groups, kept, strict=True):
        shape, curve = ExpertShape.of(shared[0]), curves[shared[0].name]
        tables.append([Candidate(shape.bytes(choice), curve.effect(choice)) for choice in own])
    numbers = cheapest(tables, room)
    if numbers is None:
        return None
    taken = [table[number] for table, number in zip(tables, numbers, strict=True)]
    choices = {name: options[number] for name, options, number in zip(names, kept, numbers, strict=True)}
    predicted = {name: item.effect for name, item in zip(names, taken, strict=True)}
    return Chosen(choices, sum(item.bytes for item in taken), predicted)


def best_single(
    layers: Layers, curves: Mapping[str, LayerCurves], config: SizeConfig, limit: int, skip: Sequence[str] = ()
) -> dict[str, Chosen]:
    """Return the single method of least predicted effect within the bytes, by its name; nothing where none fits."""
    found = measured_singles(layers, curves, config, skip)
    fits = [name for name, item in found.items() if item.bytes <= limit]
    best = min(fits, key=lambda name: sum(found[name].predicted.values()), default=None)
    return {} if best is None else {best: found[best]}


def measured_singles(
    layers: Layers, curves: Mapping[str, LayerCurves], config: SizeConfig, skip: Sequence[str] = ()
) -> dict[str, Chosen]:
    """Return the single methods that the curves tell of, with their predicted effects."""
    found = {}
    for name, item in single_methods(layers, config, skip).items():
        with contextlib.suppress(ValueError):  # what was not measured
            predicted = {layer: curves[layer].effect(choice) for layer, choice in item.choices.items()}
            found[name] = replace(item, predicted=predicted)
    return found


def single_methods(layers: Layers, config: SizeConfig, skip: Sequence[str] = ()) -> dict[str, Chosen]:
    """Return the methods that do one thing to all layers, by name: all experts in so many bits, or fewer experts."""
    groups, fixed = layers.selected(skip).tied, fixed_bytes(layers, skip)
    found = {}
    for bits in sorted(config.bits, reverse=True):
        own = replace(config, bits=(bits,))
        rounded = [_rounded(shared, own) for shared in groups]
        if None not in rounded:
            found[f"all experts at {bits} bits"] = [choice for choice in rounded if choice]
    exact = 1 in (len(config.bits), len(config.ranks or ()))
    for reduce, share in () if exact else itertools.product(config.reductions, (0.75, 0.5, 0.25)):
        counts = [nearest_count(shared[0], share * shared[0].num_experts, reduce, config) for shared in groups]
        if None not in counts and not (config.uniform_experts and len(set(counts)) > 1):
            found[f"{share:.0%} of the experts, {reduce}d"] = [Choice(count, reduce) for count in counts if count]
    return {name: _in_all(groups, choices, fixed) for name, choices in found.items()}


def _rounded(shared: Sequence[MoELayer], config: SizeConfig) -> Choice | None:
    """Return the choice that keeps all experts, in the bits of the options; None where there is none."""
    whole = (choice for choice in candidates(shared, config) if choice.experts == shared[0].num_experts)
    return next((choice for choice in whole if choice.w_in or len(shared) > 1), None)


def _in_all(groups: Sequence[Sequence[MoELayer]], choices: Sequence[Choice], fixed: int) -> Chosen:
    sizes = [choice_bytes(shared[0], choice) for shared, choice in zip(groups, choices, strict=True)]
    named = {shared[0].name: choice for shared, choice in zip(groups, choices, strict=True)}
    return Chosen(named, fixed + sum(sizes), {})


def check_reachable(layers: Layers, config: SizeConfig, limit: int, skip: Sequence[str] = ()) -> None:
    """Check, from shapes alone, that a size can be reached, and that something has to be done for it.

    Raises:
        ValueError: not.
    """
    least, whole = smallest_bytes(layers, config, skip), fixed_bytes(layers, skip) + whole_bytes(layers, skip)
    if limit < least:
        raise ValueError(
            f"size={config.size!r} is {bytes_text(limit)} for this model, and the smallest that can be reached is "
            f"{bytes_text(least)}: ask for that or more, or allow fewer bits or experts."
        )
    if limit >= whole:
        raise ValueError(
            f"size={config.size!r} is {bytes_text(limit)} for this model, which in the dtype it is loaded in takes "
            f"{bytes_text(whole)} as it is: nothing is to be done but to save it in that dtype."
        )


def smallest_bytes(layers: Layers, config: SizeConfig, skip: Sequence[str] = ()) -> int:
    """Return the bytes of the weight files of the smallest result that the options allow."""
    groups = layers.selected(skip).tied
    options, sizes = [candidates(shared, config) for shared in groups], [ExpertShape.of(x).bytes for x, *_ in groups]
    parts = [
        sum(min(map(size, choices)) for size, choices in zip(sizes, part, strict=True))
        for part in _parts(options, config)
    ]
    if not parts:
        raise ValueError(
            f"size={config.size!r} cannot be reached: the layers have no number of experts, or no bits, in common "
            "that are allowed. Allow more of them, or name layers in `skip`."
        )
    return fixed_bytes(layers, skip) + min(parts)


def candidates(shared: Sequence[MoELayer], config: SizeConfig) -> list[Choice]:
    """Return what layers that share their experts may become, from shapes alone: all experts first."""
    first = shared[0]
    reductions = [(first.num_experts, config.reductions[0])]  # of which there are statistics
    reductions += [(count, reduce) for reduce in config.reductions for count in expert_counts(first, reduce, config)]
    reductions = [item for item in reductions if config.counts is None or item[0] in config.counts]
    w_in, w_out = (_may_be_dense(own, shared, config) for own in grids(first, config))
    stored = [(one, other) for one, other in itertools.product(w_in, w_out) if (one is None) == (other is None)]
    stored = [(one, other) for one, other in stored if config.alike == NOTHING or one == other]
    return [
        Choice(count, reduce, one, other, rank)
        for (count, reduce), rank, (one, other) in itertools.product(reductions, _ranks(shared, config), stored)
        # Factors are measured with the same bits in both matrices.
        if rank is None or (one and one.bits) == (other and other.bits)
    ]


def expert_counts(layer: MoELayer, reduce: str, config: SizeConfig) -> list[int]:
    """Return the numbers of fewer experts that a layer may have, from the most on."""
    step = max(1, layer.num_experts // STEPS)
    near = [nearest_count(layer, count, reduce, config) for count in range(layer.num_experts - step, 0, -step)]
    return sorted({count for count in near if count and count < layer.num_experts}, reverse=True)


def nearest_count(layer: MoELayer, count: float, reduce: str, config: SizeConfig) -> int | None:
    """Return the number of experts nearest to `count` that a reduction can leave; None where it can leave none.

    A token's picks must find as many experts, and a router that picks by groups wants as many in each of them.
    """
    least, unit = max(config.min_experts, layer.top_k or 1, 1), 1
    if reduce == "prune":
        try:
            fewest, unit = cut_limits(layer.model, layer.name)
        except ValueError:
            return None
        least = max(least, fewest)
    if config.counts is not None:
        allowed = [own for own in config.counts if least <= own <= layer.num_experts and own % unit == 0]
        return min(allowed, key=lambda own: (abs(own - count), -own), default=None)
    units = max(round(count / unit), -(-least // unit))
    return min(units * unit, layer.num_experts)


def ranks(shared: Sequence[MoELayer], config: SizeConfig) -> list[int]:
    """Return the ranks at which low rank + sparse takes fewer bytes, the largest first; none where layers share.

    Raises:
        ValueError: one that is asked for is none of them.
    """
    first, shape = shared[0], ExpertShape.of(shared[0])
    side = min(first.hidden_size, first.intermediate_size)
    asked = {side // part for part in RANKS} if config.ranks is None else set(config.ranks)
    found = {
        rank
        for rank in asked
        if len(shared) == 1
        and 0 < rank <= side
        and all(stored_share(rank, Choice.keep, *size) < 1 for size in (shape.w_in, shape.w_out))
    }
    if config.ranks is not None and (wrong := asked - found):
        raise ValueError(
            f"rank={min(wrong)} makes the experts of {first.name} no smaller, or they are shared by layers, which "
            "cannot be of low rank: ask for another rank, or skip the layer."
        )
    return sorted(found, reverse=True)


def _ranks(shared: Sequence[MoELayer], config: SizeConfig) -> list[int | None]:
    known = ranks(shared, config)
    is_exact = config.ranks is not None and len(config.ranks) == 1  # a single number means exactly that
    return [*known] if is_exact else [None, *known]


def grids(layer: MoELayer, config: SizeConfig) -> tuple[list[Grid], list[Grid]]:
    """Return the grids that W_in and W_out of a layer's experts may have, from the most bits on."""
    is_alike, widths = config.alike != NOTHING, (layer.hidden_size, layer.intermediate_size)
    widths = (math.gcd(*widths),) * 2 if is_alike else widths  # whose groups divide both
    sizes = [group_size_for(width, config.group_size) for width in widths]
    first, second = (
        [Grid(bits, size, symmetric=is_alike) for bits in sorted(config.bits, reverse=True)] for size in sizes
    )
    return first, second


def _may_be_dense(grids: Sequence[Grid], shared: Sequence[MoELayer], config: SizeConfig) -> list[Grid | None]:
    """Return grids, and before them None for weights as they are where that may be."""
    if len(shared) > 1:  # a weight that layers share is not stored in few bits
        return [None]
    return [*grids] if len(config.bits) == 1 else [None, *grids]  # a single number of bits means exactly that


def _measured(shared: Sequence[MoELayer], curves: LayerCurves, config: SizeConfig) -> list[Choice]:
    """Return the candidates that the curves tell of."""
    return [
        choice
        for choice in candidates(shared, config)
        if (choice.experts == curves.experts or curves.reduced.get(choice.reduce))
        and (choice.rank is None or choice.rank in curves.low_rank)
    ]


@dataclass(frozen=True)
class ExpertShape:
    """What one expert of a layer is made of: its matrices (out, in), parameters of its biases, and their dtype."""

    w_in: tuple[int, int]
    w_out: tuple[int, int]
    biases: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: MoELayer) -> "ExpertShape":
        """Return the shape of a layer's experts."""
        expert, dtype = layer.read().expert(0), layer.parameters[0][1].dtype
        width, hidden_size = expert["up"].shape
        biases = sum(tensor.numel() for role, tensor in expert.items() if role.endswith("_bias"))
        return cls(((1 + ("gate" in expert)) * width, hidden_size), (hidden_size, width), biases, dtype)

    def bytes(self, choice: Choice) -> int:
        """Return the bytes of a layer's experts as a choice stores them."""
        if choice.rank is None:
            matrices = expert_bytes(self.w_in, choice.w_in, self.dtype)
            matrices += expert_bytes(self.w_out, choice.w_out, self.dtype)
        else:
            matrices = self._factors(self.w_in, self.w_in[0], choice.w_in, choice)
            matrices += self._factors(self.w_out, self.w_out[1], choice.w_out, choice)
        return choice.experts * (matrices + self.biases * self.dtype.itemsize) + HEADER * self._tensors(choice)

    @staticmethod
    def _tensors(choice: Choice) -> int:
        """Return how many tensors more than the layer's own are stored, at most."""
        if choice.rank is not None:
            return MORE_OF_FACTORS
        if choice.w_in is not None:
            return MORE
        return 3 * choice.experts if choice.reduce == "prune" else 0  # plain checkpoints may have them one by one

    def _factors(self, shape: tuple[int, int], units: int, grid: Grid | None, choice: Choice) -> int:
        """Return the bytes of U, V, the kept ones of the `units` that S has, and their places."""
        (out, width), rank, kept = shape, choice.rank or 0, round(choice.keep * units)
        parts = [(out, rank), (rank, width), (kept, self.w_in[1])]
        own = [grid and replace(grid, group_size=group_size_for(part[1], grid.group_size)) for part in parts]
        stored = sum(expert_bytes(part, one, self.dtype) for part, one in zip(parts, own, strict=True))
        return stored + kept * torch.int32.itemsize


def choice_bytes(layer: MoELayer, choice: Choice) -> int:
    """Return the bytes of a layer's experts as a choice stores them."""
    return ExpertShape.of(layer).bytes(choice)


def whole_bytes(layers: Layers, skip: Sequence[str] = ()) -> int:
    """Return the bytes of the experts that may be changed, as they are."""
    return sum(choice_bytes(shared[0], Choice(shared[0].num_experts)) for shared in layers.selected(skip).tied)


def fixed_bytes(layers: Layers, skip: Sequence[str] = ()) -> int:
    """Return the bytes of the weight files that stay as they are: all but the experts that may be changed."""
    held = account(layers).bytes_resident
    buffers, saved = dict(layers.model.named_buffers()), layers.model.state_dict().keys()
    unsaved = sum(tensor.nbytes for name, tensor in buffers.items() if name not in saved)
    return held - unsaved - whole_bytes(layers, skip) + HEADER * len(saved)
