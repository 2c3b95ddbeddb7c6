"""Deciding on a merge plan from statistics, and checking beforehand that what is asked for can be decided."""

import warnings
from collections.abc import Iterator
from types import NoneType
from typing import cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.collect import check_finite
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.methods.budget import BUDGET, budget_total
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.config import CONSTANT, REGISTRIES, SLICE, MergeConfig
from hf_mcsmoe.methods.grouping import Groups, grouped_within
from hf_mcsmoe.methods.pruning import SELECTION, keeping_order
from hf_mcsmoe.methods.registry import method_name
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.subsets import check_subsets
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.configuration_mcsmoe import config_class_for, family_of
from hf_mcsmoe.modeling.modeling_mcsmoe import merged_class
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.plan import LayerPlan, MergePlan, provenance
from hf_mcsmoe.processes import current

# Fewer calibration tokens per expert than this leave frequencies to chance.
FEW_TOKENS = 8


def plan_merge(
    model: PreTrainedModel | Layers, statistics: RoutingStatistics, config: MergeConfig | None = None
) -> MergePlan:
    """Decide which experts merge (paper, section 3.1): saliency, budget over the layers, groups, weights.

    Or, with `reduce="prune"`, which stay: the most salient of each layer, or of each of the groups of its router.

    Args:
        model: a model, or its layers where they are found already.

    Raises:
        ValueError: statistics of another model, with NaN or without a sum that a method needs, a pattern of `skip`
            that matches no layer, or more experts asked for than a layer has.
    """
    check_given(statistics=(statistics, RoutingStatistics), config=(config, (MergeConfig, NoneType)))
    config = (config or MergeConfig()).resolved()
    layers = Layers.of(model).uncompressed()
    check_whole(layers.model, "a plan")
    layers = check_request(layers, config)
    if statistics.fingerprint != layers.fingerprint:
        raise ValueError("The statistics were taken from another model; run collect_statistics on this one.")
    check_finite(statistics)
    statistics.check({layer.name: layer.sizes for layer in layers})
    _warn_if_few_tokens(layers, statistics)
    sums = [statistics.together([layer.name for layer in shared]) for shared in layers.tied]
    for layer in sums:
        layer.check(config.needs)
    plans = current().agreed(lambda: _decided(layers, sums, config))
    given = [method if callable(method) else None for method in (config.alignment, config.merging)]
    tokens = {name: int(layer.tokens) for name, layer in statistics.layers.items()}
    return MergePlan(plans, provenance(layers, tokens, config), *given)


def _decided(layers: Layers, sums: list[Sums], config: MergeConfig) -> dict[str, LayerPlan]:
    """Return the plan of each layer."""
    scores, salient = [], SALIENCY[cast(str, config.saliency)]
    for (first, *_), layer in zip(layers.tied, sums, strict=True):
        with first.view(layer, config.seed) as view:
            scores.append(salient(view))
    items = (_pruned if config.reduce == "prune" else _merged)(layers, sums, scores, config)
    return {layer.name: item for shared, item in zip(layers.tied, items, strict=True) for layer in shared}


def _merged(layers: Layers, sums: list[Sums], scores: list[torch.Tensor], config: MergeConfig) -> Iterator[LayerPlan]:
    """Yield for each set of experts how they merge."""
    chosen = {stage: registry[getattr(config, stage)] for stage, registry in REGISTRIES.items()}
    least = max(config.least(len(saliency)) for saliency in scores)
    is_cut = config.cuts_router or config.plain
    limits = [_limits(layers, shared) if is_cut else (1, 1) for shared in layers.tied]
    least = max(least, *(few for few, _ in limits))
    counts = _counts(scores, config.experts, least, config)
    for shared, layer, saliency, count, (_, parts) in zip(layers.tied, sums, scores, counts, limits, strict=True):
        with shared[0].view(layer, config.seed, config.capacity) as view:
            similarity = chosen["similarity"](view)
            count -= count % parts  # a whole number of experts is checked beforehand
            groups = grouped_within(chosen["grouping"], parts, view, saliency, similarity, count)
            weights = chosen["weighting"](view, saliency, groups)
        kept = groups.dominant if config.cuts_router else None
        yield LayerPlan(groups.expert_map, groups.dominant, weights.tolist(), *_shown(groups, similarity, layer), kept)


def _pruned(layers: Layers, sums: list[Sums], scores: list[torch.Tensor], config: MergeConfig) -> Iterator[LayerPlan]:
    """Yield for each set of experts which of them stay: as many of each group of a router."""
    limits = [_limits(layers, shared) if config.cuts_router else (1, 1) for shared in layers.tied]
    orders = [keeping_order(saliency, groups) for saliency, (_, groups) in zip(scores, limits, strict=True)]
    units = [saliency[order].sum(1) for saliency, order in zip(scores, orders, strict=True)]
    least = max(max(-(-config.min_experts // groups), few // groups) for few, groups in limits)
    # Of a whole number of experts the groups share alike; see `check_request`.
    experts = config.experts // limits[0][1] if isinstance(config.experts, int) else config.experts
    numbers = _counts(units, experts, least, config)
    select = SELECTION[config.selection]
    for shared, layer, saliency, (_, groups), count in zip(layers.tied, sums, scores, limits, numbers, strict=True):
        with shared[0].view(layer, config.seed) as view:
            kept = select(view, saliency, count * groups, groups)
        counts = layer.counts.tolist() if "counts" in layer else None
        yield LayerPlan.pruned(len(saliency), kept, counts)


def _limits(layers: Layers, shared: list[MoELayer]) -> tuple[int, int]:
    """Return how few experts the routers of layers that share them can do with, and in how many groups."""
    found = [cut_limits(layers.model, layer.name) for layer in shared]
    return max(least for least, _ in found), max(groups for _, groups in found)


def _counts(saliency: list[torch.Tensor], experts: int | float, min_experts: int, config: MergeConfig) -> list[int]:
    counts: list[int] = BUDGET[config.budget](saliency, experts, min_experts)
    _check_counts(counts, [len(scores) for scores in saliency], method_name(config.budget))
    return counts


def _shown(groups: Groups, similarity: torch.Tensor, sums: Sums) -> tuple[list[float | None], list[int] | None]:
    """Return what the plan shows of a layer: similarity [E] of each expert to its dominant, and its picks [E]."""
    nearest = [similarity[expert, groups.dominant[group]] for expert, group in enumerate(groups.expert_map)]
    shown = [round(float(value), 4) if value.isfinite() else None for value in nearest]
    return shown, sums.counts.tolist() if "counts" in sums else None


def check_request(layers: Layers, config: MergeConfig) -> Layers:
    """Return the layers to merge after checking, before any forward, that `config` can be met.

    Raises:
        ValueError: see `Layers.selected`; more experts asked for than a layer has, or fewer than `min_experts` leaves;
            a model whose class or type a merged checkpoint could not name.
    """
    merged_class(type(layers.model))
    config_class_for(*family_of(type(layers.model.config)))
    layers = layers.selected(config.skip)
    for layer in layers:
        if isinstance(config.experts, int) and config.experts > layer.num_experts:
            raise ValueError(
                f"experts={config.experts} is more than the {layer.num_experts} experts of {layer.name}: ask for less."
            )
    if config.pruned_router != SLICE and config.reduce != "prune":
        raise ValueError(
            f"pruned_router={config.pruned_router!r} keeps the rows of experts that are pruned, and "
            f"reduce={config.reduce!r} is no pruning: choose reduce='prune', or leave it out."
        )
    if config.cuts_router or config.plain:
        _check_pruning(layers, config)
    elif config.reduce == "prune":
        _check_constants(layers, config)
    total = budget_total(config.experts, [layer.num_experts for layer in layers])
    if config.min_experts * len(layers) > total or config.min_experts > min(layer.num_experts for layer in layers):
        raise ValueError(
            f"min_experts={config.min_experts} in {len(layers)} layers is more than the {total} experts to keep: "
            "lower it or raise `experts`."
        )
    if sum(config.least(layer.num_experts) for layer in layers) > total:
        raise ValueError(
            f"capacity={config.capacity} is too few for the {total} groups that all layers have together: raise it or "
            "`experts`."
        )
    return layers


def _check_pruning(layers: Layers, config: MergeConfig) -> None:
    """Raise ValueError where a router cannot be cut, or not to as few experts as are asked for."""
    limits = [_limits(layers, shared) for shared in layers.tied]
    sizes = [shared[0].num_experts for shared in layers.tied]
    least, groups = max(few for few, _ in limits), max(groups for _, groups in limits)
    if config.reduce != "prune" and groups > 1 and not config.plain:
        raise ValueError(
            f"router={config.router!r} leaves a row for each group of experts, and these routers pick among {groups} "
            "groups of their own, which merged experts do not keep: choose router='map'."
        )
    if isinstance(config.experts, int) and config.experts % groups:
        raise ValueError(
            f"experts={config.experts} cannot be shared alike by the {groups} groups that the routers pick among: "
            f"keep a multiple of {groups}."
        )
    if config.selection == "exhaustive" and (scaled := next((x.name for x in layers if x.scales_inputs), None)):
        raise ValueError(
            f"selection='exhaustive' does not know routers that scale inputs, as that of {scaled} does: choose "
            "selection='salient'."
        )
    if config.selection == "exhaustive":  # or with as many in each layer
        for size in sizes:
            share = config.experts if isinstance(config.experts, int) else round(config.experts * size)
            check_subsets(size, max(share, 1), groups)
    if budget_total(config.experts, sizes) < least * len(sizes):
        raise ValueError(
            f"experts={config.experts} leaves less than the {least} experts a layer that the routers need at least: "
            "raise `experts`, or merge."
        )


def _check_constants(layers: Layers, config: MergeConfig) -> None:
    """Raise ValueError where constants cannot stand in the place of pruned experts."""
    if shared := next((tied for tied in layers.tied if len(tied) > 1), None):
        raise ValueError(
            f"{', '.join(layer.name for layer in shared)} share their experts, of which none can give way to a "
            f"constant (pruned_router={config.pruned_router!r}): choose pruned_router={SLICE!r}, or name them in "
            "`skip`."
        )


def saved_parameters(layers: Layers, config: MergeConfig) -> int:
    """Return how many parameters the merge removes, up to how the layers share the experts."""
    chosen = [tied[0] for tied in layers.selected(config.skip).tied]
    sizes = [layer.num_experts for layer in chosen]
    held = sum(layer.num_parameters for layer in chosen)
    gone = sum(sizes) - budget_total(config.experts, sizes)
    constants = gone * chosen[0].hidden_size if config.pruned_router == CONSTANT else 0
    return round(held * gone / sum(sizes)) - constants


def _check_counts(counts: list[int], sizes: list[int], name: str) -> None:
    """Raise ValueError where a budget's answer is not a number of experts, 1 to E, for each layer."""
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
    fits = whole and len(counts) == len(sizes)
    if not fits or not all(1 <= count <= size for count, size in zip(counts, sizes, strict=True)):
        raise ValueError(
            f"The budget {name} answered {counts!r}; it must return whole numbers of experts to keep, one for each of "
            f"the {len(sizes)} layers, from 1 to {sizes}."
        )


def _warn_if_few_tokens(layers: Layers, statistics: RoutingStatistics) -> None:
    few = [layer.name for layer in layers if statistics[layer.name].tokens < FEW_TOKENS * layer.num_experts]
    if few:
        seen = min(int(statistics[name].tokens) for name in few)
        warnings.warn(
            f"Few calibration tokens ({seen}) in {', '.join(few)}: groups rest on chance; calibrate on more text.",
            stacklevel=3,
        )
