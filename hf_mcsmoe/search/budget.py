"""How many experts each layer keeps, by what fewer of them were measured to cost (`budget="measured"`)."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.merge import merge_layers
from hf_mcsmoe.methods.budget import MEASURED, budget_total
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan, plan_merge
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts
from hf_mcsmoe.search.choices import nearest_count
from hf_mcsmoe.search.conditions import covered
from hf_mcsmoe.search.config import CLOSED_FORMS, JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, plan_with
from hf_mcsmoe.search.knapsack import Candidate, cheapest
from hf_mcsmoe.search.probe import MEMORY_LIMIT, parted_rows

NONE = RepairConfig(method="none")
# Budgets that the measured one is compared with on rows held out.
OTHERS = ("uniform", "adaptive")


def measured_plan(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    repair: RepairConfig | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergePlan:
    """Return the plan of the asked number of experts whose effect is least.

    Curves of fewer experts are measured layer by layer, each fitted as it will be, or taken from the statistics, and
    a knapsack over the layers chooses. What it makes of the model is then compared, on rows held out, with what the
    uniform and the adaptive budget make of it, and the best is taken; the plan tells the divergence of each in nats,
    under "budgets".

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
    curves = statistics.curves
    if not covered(layers, statistics, merge, search, fitted):
        curves = measure_curves(layers, statistics, batches, merge, search, repair=fitted, progress=progress)
    chosen = cheapest([_costs(curves[x[0].name], own, merge) for x, own in zip(groups, counts, strict=True)], total)
    assert chosen is not None  # as was checked
    taken = [own[number] for own, number in zip(counts, chosen, strict=True)]
    measured = plan_with(layers, statistics, merge, taken, merge.reduce)
    plans = {MEASURED: measured, **_other_plans(layers, statistics, merge, measured)}
    effects = _effects(layers, statistics, plans, batches, fitted)
    plan = plans[min(effects, key=lambda name: effects[name])] if effects else measured
    return replace(plan, provenance={**plan.provenance, "config": merge.to_dict(), "budgets": effects})


def _other_plans(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, measured: MergePlan
) -> dict[str, MergePlan]:
    """Return the plans of the budgets that measure nothing, where they can be met and are not the same."""
    plans: dict[str, MergePlan] = {}
    for budget in OTHERS:
        with contextlib.suppress(ValueError):
            plan = plan_merge(layers, statistics, replace(merge, budget=budget))
            if all(plan.layers != other.layers for other in (measured, *plans.values())):
                plans[budget] = plan
    return plans


def _effects(
    layers: Layers,
    statistics: RoutingStatistics,
    plans: Mapping[str, MergePlan],
    batches: Sequence[Batch],
    repair: RepairConfig,
) -> dict[str, float]:
    """Return the divergence of what each plan makes of the model, fitted, on rows that no fit saw.

    Effects of layers are added where a plan is chosen; where much is cut, they do not add up. Nothing is returned
    where there is no choice, or no row to judge on.
    """
    rows, judges = parted_rows(list(apart(layers.model, batches)))
    if len(plans) == 1 or not rows or not judges:
        return {}
    judge, effects = Judge(judges, memory_limit=MEMORY_LIMIT), dict[str, float]()
    judge.remember(layers.model)
    for name, plan in plans.items():
        model = merge_layers(layers, plan, statistics=statistics)
        if repair.method != "none" and any(not item.is_whole for item in plan.layers.values()):
            repair_experts(model, layers, rows, repair)
        judge.measure(name, model)
        kl = judge.quality.pop(name).kl
        effects |= {} if kl is None else {name: kl}
    return effects


def _counts(layer: MoELayer, search: SizeConfig) -> list[int]:
    """Return the numbers of experts that a layer may keep, all of them first."""
    fewer = [nearest_count(layer, count, search.reduce, search) for count in range(1, layer.num_experts)]
    return sorted({layer.num_experts, *(count for count in fewer if count)}, reverse=True)


def _costs(curves: LayerCurves, counts: Sequence[int], merge: MergeConfig) -> list[Candidate]:
    return [Candidate(count, curves.reduction_effect(merge.reduce, count)) for count in counts]
