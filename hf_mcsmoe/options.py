"""Which options of `compress` go together, checked before any forward and without weights."""

from collections.abc import Mapping
from dataclasses import replace
from types import NoneType
from typing import Any

import torch

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.budget import BUDGET, MEASURED, adaptive_budget, uniform_budget
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.config import MIXED, MergeConfig
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.planning import check_request
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import SEQUENTIAL
from hf_mcsmoe.search.budget import Budgeting
from hf_mcsmoe.search.compress import check_size
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import check_sparsity, narrowed


def check_kinds(config: Any, repair: Any, low_rank: Any, quantization: Any, sparsity: Any, statistics: Any) -> None:
    """Raise TypeError where an argument of a compression is of the wrong kind."""
    check_given(
        config=(config, (MergeConfig, NoneType)),
        repair=(repair, (RepairConfig, NoneType)),
        low_rank=(low_rank, (LoSparseConfig, NoneType)),
        quantization=(quantization, (QuantizationConfig, NoneType)),
        sparsity=(sparsity, (SparsityConfig, NoneType)),
        statistics=(statistics, (RoutingStatistics, NoneType)),
    )


def all_needs(
    config: MergeConfig, search: SizeConfig | None, quantization: QuantizationConfig | None
) -> tuple[str, ...]:
    """Return the statistics that the merge, or what may be chosen for a size, and bits by importance read."""
    return (needs_of(config, search) if search else config.needs) + (quantization.needs if quantization else ())


def sparsity_needs(layers: Layers, config: MergeConfig, sparsity: SparsityConfig | None) -> tuple[str, ...]:
    """Return the statistics of the original that tell what to leave out inside experts, where all of these stay.

    Of merged or pruned layers a pass of its own tells it.
    """
    return tuple(SCORE.needs(sparsity.score)) if sparsity and merges_nothing(layers, config) else ()


def chosen_repair(repair: RepairConfig | None) -> RepairConfig | None:
    """Return the repair, or None where its method is "none"."""
    return None if repair is None or repair.method == "none" else repair


def check_options(
    layers: Layers,
    config: MergeConfig,
    *,
    repair: RepairConfig | None,
    low_rank: LoSparseConfig | None,
    quantization: QuantizationConfig | None = None,
    sparsity: SparsityConfig | None = None,
    consume: bool = False,
    size: SizeConfig | None = None,
) -> None:
    """Check, before any forward and without weights, that all of `compress` can be done to a model of these `layers`.

    Raises:
        ValueError: see `check_request`, `Budgeting.of`, `check_low_rank`, `QuantizationConfig.check_layers` and
            `check_size`; nothing to repair; `consume` together with what needs the original, or may be refused when it
            is used up.
    """
    if size:
        size.check_repair(repair)
        others = {"low_rank": low_rank, "quantization": quantization, "sparsity": sparsity, "consume": consume}
        _check_for_size(layers, config, size, others)
        return
    left = chosen = check_request(layers, config)
    if config.budget == MEASURED:
        Budgeting.of(layers, config, repair)
    if sparsity:
        check_sparse(layers, sparsity, low_rank, quantization)
        left = narrowed(layers, sparsity) if sparsity.is_units else chosen  # of which all are stored so
    if low_rank:
        check_low_rank(left, low_rank)
    if quantization:
        stored = left.selected(quantization.skip)
        if shared := next((tied for tied in stored.tied if len(tied) > 1), None):
            raise ValueError(
                f"{', '.join(layer.name for layer in shared)} share their experts and cannot be stored in few bits: "
                "name them in `skip`."
            )
        quantization.check_layers(stored)
    check_repair(not merges_nothing(layers, config), repair, low_rank, quantization, sparsity)
    _check_normed(chosen, config, repair, is_quantized=quantization is not None)
    _check_router(config, repair)
    _check_sequential(config, repair)
    if consume and repair:
        raise ValueError("consume=True frees the experts that `repair` compares with; leave out one of them.")
    if consume and low_rank and low_rank.energy is not None and not low_rank.allow_dense:
        raise ValueError(
            f"With energy={low_rank.energy} the merged weights decide on the ranks, and consume=True leaves no model "
            "to go back to if they are too large: pass allow_dense=True, or leave out consume."
        )


def _check_for_size(layers: Layers, config: MergeConfig, size: SizeConfig, others: Mapping[str, Any]) -> None:
    """Check what can be checked of a search for a size.

    Raises:
        ValueError: see `check_size`; or what a search for a size does not go with.
    """
    check_request(layers, replace(config, experts=1.0, min_experts=size.min_experts))
    check_size(layers, config, size)
    check_unsized(config, size)
    for name, value in others.items():
        if value:
            raise ValueError(
                f"size={size.size!r} chooses what is stored, and compares with the original to the end: leave out "
                f"{name}, or say how many experts to keep in place of a size."
            )


def check_unsized(config: MergeConfig, size: SizeConfig) -> None:
    """Raise ValueError where options of a merge would do nothing, because a size chooses how many experts stay."""
    usual = MergeConfig()
    for name in ("experts", "budget", "reduce", "min_experts", "router", "pruned_router"):
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} does nothing beside size={size.size!r}, which chooses how many "
                "experts stay: leave it out; SizeConfig has the options of a size."
            )


def merges_nothing(layers: Layers, config: MergeConfig) -> bool:
    """Tell whether every layer will keep all its experts; False where that depends on their saliency.

    Raises:
        ValueError: see `check_request`.
    """
    layers = check_request(layers, config)
    budget, sizes = BUDGET[config.budget], [layer.num_experts for layer, *_ in layers.tied]
    if budget not in (uniform_budget, adaptive_budget):
        return False
    return budget([torch.ones(size) for size in sizes], config.experts, config.min_experts) == sizes


def check_repair(
    is_merged: bool,
    repair: RepairConfig | None,
    low_rank: LoSparseConfig | None,
    quantization: QuantizationConfig | None,
    sparsity: SparsityConfig | None,
) -> None:
    """Raise ValueError where a repair has nothing to do."""
    narrower = sparsity is not None and sparsity.is_units
    changed = is_merged or quantization or narrower or (low_rank and repair and repair.method == "local")
    if repair and not changed:
        raise ValueError(
            f"Every layer keeps all its experts, so repair={repair.method!r} has nothing to do: give none. Where "
            "the experts become low rank + sparse, method 'local' repairs that; in few bits, every method."
        )


def _check_router(config: MergeConfig, repair: RepairConfig | None) -> None:
    """Raise ValueError where what a new router picks is not known to what would be fitted or measured."""
    if config.reduce != "prune" and config.router in MIXED and (repair or config.budget == MEASURED):
        asked = f"repair={repair.method!r}" if repair else f"budget={config.budget!r}"
        raise ValueError(
            f"router={config.router!r} gives routers new rows, and {asked} knows what the old ones pick: choose "
            "router='dominant' or 'map', or leave it out."
        )


def _check_sequential(config: MergeConfig, repair: RepairConfig | None) -> None:
    """Raise ValueError where constants stand in for experts, which a repair in sequence cannot look at."""
    if repair and repair.sequential and config.reduce == "prune" and not config.cuts_router:
        raise ValueError(SEQUENTIAL)


def check_sparse(
    layers: Layers,
    sparsity: SparsityConfig,
    low_rank: LoSparseConfig | None,
    quantization: QuantizationConfig | None,
) -> None:
    """Raise ValueError where experts cannot be made sparse, or what follows would fill the zeros."""
    check_sparsity(layers, sparsity, has_data=True)
    later = "low_rank" if low_rank else "quantization" if quantization else None
    if later and not sparsity.is_units:
        raise ValueError(
            f"{later} would make other values of the zeros that sparsity={sparsity.pattern!r} leaves: leave out one "
            "of them, or choose the pattern 'units', of which none are left."
        )


def _check_normed(layers: Layers, config: MergeConfig, repair: RepairConfig | None, *, is_quantized: bool) -> None:
    """Raise ValueError where outputs that a norm follows would be fitted together."""
    normed = next((layer.name for layer in layers if layer.is_normed), None)
    if normed is None or repair is None or repair.method not in ("refit", "joint", "local"):
        return
    if config.reduce == "prune" and (repair.method != "local" or is_quantized):
        beside = " beside few bits" if repair.method == "local" else ""
        raise ValueError(
            f"{normed} has a norm behind each expert, so no repair in closed form fits what a pruning left of them: "
            f"repair={repair.method!r} cannot be done{beside}; choose 'none'"
            + (", or 'local' without few bits." if is_quantized else " or 'local'.")
        )
    if repair.method == "joint":
        raise ValueError(
            f"{normed} has a norm behind each expert, so that their outputs do not add up: choose the repair 'refit', "
            "which fits its experts one by one, or 'local'."
        )
