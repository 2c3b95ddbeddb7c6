"""How many experts each layer keeps, by what fewer of them were measured to cost (`budget="measured"`)."""

import contextlib
import itertools
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
from hf_mcsmoe.methods.choice import AUTO, Choice
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts
from hf_mcsmoe.search.apply import plan_choices
from hf_mcsmoe.search.choices import nearest_count
from hf_mcsmoe.search.conditions import covered
from hf_mcsmoe.search.config import CLOSED_FORMS, JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves
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
    groups = layers.selected(merge.skip).tied
    # Behind a norm outputs do not add up: others do not make up for those that are gone, and each is fitted by itself.
    is_normed = any(shared[0].is_normed for shared in groups)
    reduce = "merge" if merge.reduce == AUTO and repair and is_normed else merge.reduce
    search = SizeConfig(bits=(), ranks=(), reduce=reduce, min_experts=merge.min_experts)
    total = budget_total(merge.experts, [shared[0].num_experts for shared in groups])
    ways = [_ways(shared[0], search) for shared in groups]
    least = sum(min(choice.experts for choice in own) for own in ways)
    if least > total:
        raise ValueError(
            f"experts={merge.experts!r} is {total} experts in all, and the {len(groups)} layers need at least "
            f"{least}, as many in each as a token picks: raise `experts`, or take another budget."
        )
    fitted = NONE if repair is None else repair if repair.method in CLOSED_FORMS else JOINT
    fitted = replace(fitted, sequential=False, method="refit" if is_normed and fitted == JOINT else fitted.method)
    curves = statistics.curves
    if not covered(layers, statistics, merge, search, fitted):
        curves = measure_curves(layers, statistics, batches, merge, search, repair=fitted, progress=progress)
    names = [shared[0].name for shared in groups]
    # Of a router that does not allow one of them "auto" has measured the other alone.
    ways = [[way for way in own if way.reduce in curves[name].reduced] for name, own in zip(names, ways, strict=True)]
    chosen = cheapest([_costs(curves[name], own) for name, own in zip(names, ways, strict=True)], total)
    assert chosen is not None  # as was checked
    choices = {name: own[number] for name, own, number in zip(names, ways, chosen, strict=True)}
    measured = plan_choices(layers, statistics, merge, choices)
    plans = {MEASURED: measured, **_other_plans(layers, statistics, merge, search, measured)}
    effects = _effects(layers, statistics, plans, batches, fitted)
    plan = plans[min(effects, key=lambda name: effects[name])] if effects else measured
    return replace(plan, provenance={**plan.provenance, "config": merge.to_dict(), "budgets": effects})


def _other_plans(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig, measured: MergePlan
) -> dict[str, MergePlan]:
    """Return the plans of the budgets that measure nothing, where they can be met and are not the same."""
    plans: dict[str, MergePlan] = {}
    for budget, reduce in itertools.product(OTHERS, search.reductions):
        with contextlib.suppress(ValueError):
            plan = plan_merge(layers, statistics, replace(merge, budget=budget, reduce=reduce))
            if all(plan.layers != other.layers for other in (measured, *plans.values())):
                plans[f"{budget}, {reduce}" if merge.reduce == AUTO else budget] = plan
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


def _ways(layer: MoELayer, search: SizeConfig) -> list[Choice]:
    """Return what a layer may come to, for each reduction the most experts first."""
    ways = []
    for reduce in search.reductions:
        fewer = [nearest_count(layer, count, reduce, search) for count in range(1, layer.num_experts)]
        counts = sorted({layer.num_experts, *(count for count in fewer if count)}, reverse=True)
        ways += [Choice(count, reduce) for count in counts]
    return ways


def _costs(curves: LayerCurves, ways: Sequence[Choice]) -> list[Candidate]:
    return [Candidate(way.experts, curves.reduction_effect(way.reduce, way.experts)) for way in ways]
