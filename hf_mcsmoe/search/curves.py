"""The curves of all layers: each part of a choice fitted as in the final model, its error and its effect measured."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.inputs import stream_inputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.bench import Bench
from hf_mcsmoe.search.choices import nearest_count
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.observed import Observations
from hf_mcsmoe.search.probe import Probe

# Shares of a layer's experts at which a reduction is fitted.
SHARES = (0.75, 0.5, 0.25, 0.125)
# Which experts others are merged around, or which stay. Tried: plain merging of three trained models to halves and
# three quarters of their experts diverges 1.3 to 3.3 times less by it than by frequency.
SALIENCY = "contribution"
Progress = Callable[[str, int, int], None]


def measure_curves(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    search: SizeConfig,
    *,
    repair: RepairConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerCurves]:
    """Return the curves of the layers that `merge.skip` leaves, by name; of those that share experts the first's name.

    Args:
        statistics: of these layers; with what the reductions need, see `needs_of`.
        batches: calibration data, all that a fit sees; a fifth of its rows judges.
        repair: how output matrices are fitted; None for the default.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: a sum that a reduction needs was not collected; a model or batches by which no choice is measured.
    """
    check_sums(statistics, merge, search)
    chosen, repair = layers.selected(merge.skip), repair or JOINT
    plans = plans_of_all(layers, statistics, merge, search)
    probe, seen = Probe(layers.model, batches), dict[str, Observations]()
    probe.check()
    with torch.no_grad(), evaluation_mode(layers.model):
        for done, (shared, inputs) in enumerate(stream_inputs(chosen.tied, batches, memory_limit=repair.memory_limit)):
            first = shared[0]
            with first.open() as originals:
                bench = Bench(shared, originals, inputs, statistics.together([x.name for x in shared]), probe, repair)
                seen[first.name] = bench.observations(search, plans)
            if progress:
                progress(first.name, done + 1, len(chosen.tied))
    return {name: found.curves(probe.effects) for name, found in seen.items()}


def ladder(layer: MoELayer, reduce: str, search: SizeConfig) -> list[int]:
    """Return the numbers of experts at which a reduction of a layer is fitted, from the most on."""
    counts = {nearest_count(layer, share * layer.num_experts, reduce, search) for share in SHARES}
    return sorted((count for count in counts if count and count < layer.num_experts), reverse=True)


def plans_of_all(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig
) -> dict[str, list[MergePlan]]:
    """Return the plans of each reduction; with "auto" none of one that the model's routers do not allow."""
    plans = {}
    for reduce in search.reductions:
        try:
            plans[reduce] = _plans(layers, statistics, merge, reduce, search)
        except ValueError:
            if reduce == "merge" or search.reduce == reduce:
                raise
    return plans


def _plans(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, reduce: str, search: SizeConfig
) -> list[MergePlan]:
    """Return a plan for each step of the ladder; layers with a shorter ladder stay at its end."""
    groups = layers.selected(merge.skip).tied
    ladders = [ladder(shared[0], reduce, search) or [shared[0].num_experts] for shared in groups]
    plans = []
    for step in range(max(map(len, ladders))):
        counts = [rungs[min(step, len(rungs) - 1)] for rungs in ladders]
        plans.append(plan_with(layers, statistics, merge, counts, reduce))
    return plans


def plan_with(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, counts: list[int], reduce: str = "merge"
) -> MergePlan:
    """Return the plan that leaves each set of experts so many of them."""

    sizes = [shared[0].num_experts for shared in layers.selected(merge.skip).tied]

    def budget(saliency: list[torch.Tensor], experts: float, min_experts: int) -> list[int]:
        # Of a router with groups each unit is an expert of every group.
        return [max(1, count * len(units) // size) for count, size, units in zip(counts, sizes, saliency, strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, which the plan that is taken tells
        return plan_merge(layers, statistics, replace(reduced_by(merge, reduce), experts=1.0, budget=budget))


def reduced_by(merge: MergeConfig, reduce: str) -> MergeConfig:
    """Return a configuration for one of the reductions, with `SALIENCY` where none was chosen."""
    saliency = SALIENCY if merge.saliency is None else merge.saliency
    return replace(merge, reduce=reduce, saliency=saliency, min_experts=1)


def needs_of(merge: MergeConfig, search: SizeConfig) -> tuple[str, ...]:
    """Return the statistics that the reductions which may be chosen read."""
    needs = [name for reduce in search.reductions for name in reduced_by(merge, reduce).needs]
    # By which the rows of a plain router are weighted.
    needs += ["counts"] if search.counts is not None and "merge" in search.reductions else []
    return tuple(dict.fromkeys(needs))


def check_sums(statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig) -> None:
    """Raise ValueError where a sum was not collected that a reduction which may be chosen reads."""
    for sums in statistics.layers.values():
        sums.check(needs_of(merge, search))
