"""Which layers are stored as low rank + sparse and of which ranks: by number, ratio or energy, per layer or global."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.config import LoSparseConfig


def check_low_rank(layers: Layers, config: LoSparseConfig) -> None:
    """Check before any work that the experts of `layers` can be stored as `config` says, and would be smaller.

    Needs no weights, and so says nothing of ranks that follow from them (`energy`).

    Raises:
        ValueError: they cannot, or would not, or `skip` matches nothing or leaves nothing.
    """
    layer_ranks(layers_to_decompose(layers, config.skip), config, None)


def layers_to_decompose(layers: Layers, skip: Sequence[str]) -> Layers:
    """Return the layers that no pattern of `skip` matches.

    Raises:
        ValueError: see `Layers.selected`; there is no layer, or layers share their experts.
    """
    if not len(layers):
        raise ValueError("The model has no merged layer to decompose.")
    chosen = layers.selected(skip)
    if any(len(shared) > 1 for shared in chosen.tied):
        raise ValueError("Layers that share their experts cannot be decomposed; leave them merged.")
    return chosen


def spectra_of(layer: MoELayer) -> dict[str, torch.Tensor]:
    """Return the squared singular values of a layer's "W_in" and "W_out", see `choose_ranks`, in float64."""
    return {name: _spectrum(layer, name) for name in _shapes(layer)}


def layer_ranks(
    layers: Sequence[MoELayer],
    config: LoSparseConfig,
    read: Callable[[MoELayer], Mapping[str, torch.Tensor]] | None = spectra_of,
) -> list[dict[str, int]]:
    """Return per layer the ranks of "W_in" and "W_out", without those that stay dense.

    Args:
        read: gives the squared singular values of a layer, by default those of its weights; with None ranks that
            depend on them are not chosen, and none is returned.

    Raises:
        ValueError: a rank larger than a matrix, factors larger than it (unless `allow_dense`), see `choose_ranks`.
    """
    stacks = [(layer, name, shape) for layer in layers for name, shape in _shapes(layer).items()]
    for layer, name, shape in stacks:
        if config.rank is not None and config.rank > min(shape):
            size = f"{shape[0]} x {shape[1]}"
            raise ValueError(f"rank={config.rank} is larger than {name} of {layer.name} allows, which is {size}.")
        if config.rank is not None:
            _is_smaller(f"{name} of {layer.name}", shape, config.rank, config)
    spectra = [torch.ones(min(shape)) for _, _, shape in stacks]
    by_weights = config.energy is not None or config.scope == "global"
    if config.scope == "global":  # where each gets at least one
        for layer, name, shape in stacks:
            _is_smaller(f"{name} of {layer.name}", shape, 1, config)
    if by_weights and read:
        spectra = [values for layer in layers for values in read(layer).values()]
    chosen = choose_ranks(
        spectra,
        [shape for _, _, shape in stacks],
        rank=config.rank,
        parameter_ratio=config.parameter_ratio,
        energy=config.energy,
        keep=config.keep,
        scope=config.scope if read else "layer",
    )
    if by_weights and not read:
        return []
    ranks: dict[str, dict[str, int]] = {layer.name: {} for layer in layers}
    for (layer, name, shape), rank in zip(stacks, chosen, strict=True):
        if _is_smaller(f"{name} of {layer.name}", shape, rank, config):
            ranks[layer.name][name] = rank
    return list(ranks.values())


def _is_smaller(what: str, shape: tuple[int, int], rank: int, config: LoSparseConfig) -> bool:
    """Return whether factors are smaller than their matrix; where not, raise ValueError unless `allow_dense`."""
    if stored_share(rank, config.keep, *shape) < 1:
        return True
    if config.allow_dense:
        return False
    raise ValueError(
        f"Rank {rank} and keep={config.keep} make {what} ({shape[0]} x {shape[1]}) larger than it is: lower them, or "
        "allow such weights to stay dense (allow_dense)."
    )


def _shapes(layer: MoELayer) -> dict[str, tuple[int, int]]:
    """Return (out, in) of one expert's matrices."""
    rows = layer.intermediate_size * (2 if "gate" in layer.read().tensors else 1)
    return {"W_in": (rows, layer.hidden_size), "W_out": (layer.hidden_size, layer.intermediate_size)}


def _spectrum(layer: MoELayer, name: str) -> torch.Tensor:
    """Return the squared singular values of a matrix, descending, summed over the layer's experts, in float64."""
    weights, total = layer.read(), torch.zeros(min(_shapes(layer)[name]), dtype=torch.float64)
    for expert in map(weights.expert, range(len(weights))):
        # The order of the rows, which may be interleaved, does not matter.
        parts = [expert["down"]] if name == "W_out" else [expert[role] for role in ("gate", "up") if role in expert]
        total += (torch.linalg.svdvals(torch.cat(parts).double()) ** 2).cpu()
    return total


def stored_share(rank: int, keep: float, out: int, width: int) -> float:
    """Return the parameters of U, V and the kept rows of S over those of the dense matrix [out, in]."""
    return rank * (out + width) / (out * width) + keep


def choose_ranks(
    spectra: Sequence[torch.Tensor],
    shapes: Sequence[tuple[int, int]],
    *,
    rank: int | None = None,
    parameter_ratio: float | None = None,
    energy: float | None = None,
    keep: float = 0.0,
    scope: str = "layer",
) -> list[int]:
    """Return the rank of each weight, by exactly one of `rank`, `parameter_ratio` and `energy`.

    Args:
        spectra: squared singular values per weight, descending, summed over the experts of a stack.
        shapes: (out, in) per weight.
        rank: the same for all; of scope "global", its parameters are shared out to where they save most.
        parameter_ratio: of U, V and the kept rows over the dense weight.
        energy: share of the sum of the squared singular values that U V holds.
        keep: share of the rows of S that is kept.
        scope: "layer" treats each weight by itself, "global" lets the weights compete.

    Raises:
        ValueError: a ratio that leaves nothing for U and V.
    """
    shares = [values / values.sum().clamp(min=1e-30) for values in spectra]
    if energy is not None and scope == "layer":
        return [_first_above(values, energy) for values in shares]
    costs = [out + width for out, width in shapes]
    if energy is not None:
        return _compete(shares, costs, energy_goal=energy * len(shares))
    if parameter_ratio is not None:
        budgets = [(parameter_ratio - keep) * out * width for out, width in shapes]
        ranks = [int(budget / cost + 1e-9) for budget, cost in zip(budgets, costs, strict=True)]
        if min(ranks) < 1:
            raise ValueError(
                f"parameter_ratio={parameter_ratio} with keep={keep} leaves no parameters for the low-rank part of a "
                "weight: raise the ratio or lower keep."
            )
    else:
        ranks = [int(rank or 0)] * len(shares)
        budgets = [float(one * cost) for one, cost in zip(ranks, costs, strict=True)]
    if scope == "layer":
        return ranks
    # No weight may win so many that it is no smaller than it was.
    limits = [math.ceil((1 - keep) * out * width / (out + width)) - 1 for out, width in shapes]
    return _compete(
        [values[: max(limit, 1)] for values, limit in zip(shares, limits, strict=True)], costs, sum(budgets)
    )


def _first_above(shares: torch.Tensor, energy: float) -> int:
    return min(int((shares.cumsum(0) < energy - 1e-12).sum()) + 1, len(shares))


def _compete(
    shares: Sequence[torch.Tensor],
    costs: Sequence[int],
    budget: float | None = None,
    energy_goal: float | None = None,
) -> list[int]:
    """Give ranks one by one to the weight that gains most energy per parameter; each gets at least one."""
    ranks = [1] * len(shares)
    spent, reached = sum(costs), sum(float(values[0]) for values in shares)
    steps = sorted(
        (-float(value) / cost, index, position)
        for index, (values, cost) in enumerate(zip(shares, costs, strict=True))
        for position, value in enumerate(values[1:].tolist())
    )
    for gain, index, _ in steps:
        if energy_goal is not None and reached >= energy_goal:
            break
        if budget is not None and spent + costs[index] > budget + 1e-6:
            continue
        ranks[index] += 1
        spent, reached = spent + costs[index], reached - gain * costs[index]
    return ranks
