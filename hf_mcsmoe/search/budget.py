"""How many experts each layer keeps, by what fewer of them were measured to cost (`budget="measured"`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.budget import budget_total
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.choices import nearest_count
from hf_mcsmoe.search.config import CLOSED_FORMS, JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, plan_with
from hf_mcsmoe.search.knapsack import Candidate, cheapest

NONE = RepairConfig(method="none")


def measured_plan(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    repair: RepairConfig | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergePlan:
    """Return the plan of the asked number of experts whose predicted effect is least.

    Curves of fewer experts are measured layer by layer, each fitted as it will be; a knapsack over the layers chooses.

    Args:
        repair: what follows; what trains all weights is measured as the joint refit that it begins with. None for
            nothing.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: see `measure_curves`; layers that cannot come to so few experts.
    """
    merge = merge.resolved()
    search = SizeConfig(bits=(), ranks=(), reduce=merge.reduce, min_experts=merge.min_experts)
    groups = layers.selected(merge.skip).tied
    total = budget_total(merge.experts, [shared[0].num_experts for shared in groups])
    counts = [_counts(shared[0], search) for shared in groups]
    if sum(map(min, counts)) > total:
        raise ValueError(
            f"experts={merge.experts!r} is {total} experts in all, and the {len(groups)} layers need at least "
            f"{sum(map(min, counts))}, as many in each as a token picks: raise `experts`, or take another budget."
        )
    fitted = NONE if repair is None else repair if repair.method in CLOSED_FORMS else JOINT
    fitted = replace(fitted, sequential=False)
    curves = measure_curves(layers, statistics, batches, merge, search, repair=fitted, progress=progress)
    chosen = cheapest([_costs(curves[x[0].name], own, merge) for x, own in zip(groups, counts, strict=True)], total)
    assert chosen is not None  # as was checked
    taken = [own[number] for own, number in zip(counts, chosen, strict=True)]
    plan = plan_with(layers, statistics, merge, taken, merge.reduce)
    return replace(plan, provenance={**plan.provenance, "config": merge.to_dict()})


def _counts(layer: MoELayer, search: SizeConfig) -> list[int]:
    """Return the numbers of experts that a layer may keep, all of them first."""
    fewer = [nearest_count(layer, count, search.reduce, search) for count in range(1, layer.num_experts)]
    return sorted({layer.num_experts, *(count for count in fewer if count)}, reverse=True)


def _costs(curves: LayerCurves, counts: Sequence[int], merge: MergeConfig) -> list[Candidate]:
    return [Candidate(count, curves.reduction_effect(merge.reduce, count)) for count in counts]
