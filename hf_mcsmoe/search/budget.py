"""How many experts each layer keeps, by what fewer of them were measured to cost (`budget="measured"`)."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Budgeting:
    """What a measured budget tries: a merge with its saliency, ways to fewer experts, and how each of them is fitted.

    `total` experts are asked for, of all layers together.
    """

    merge: MergeConfig
    search: SizeConfig
    repair: RepairConfig
    total: int

    @classmethod
    def of(cls, layers: Layers, merge: MergeConfig, repair: RepairConfig | None) -> "Budgeting":
        """Return what is tried for a merge, found without weights.

        Args:
            repair: what follows; what trains all weights is measured as the joint refit that it begins with. None for
                nothing.

        Raises:
            ValueError: layers that cannot come to so few experts.
        """
        merge, groups = merge.resolved(), layers.selected(merge.skip).tied
        # Behind a norm outputs do not add up: others do not make up for those that are gone, and each is fitted by
        # itself.
        is_normed = any(shared[0].is_normed for shared in groups)
        reduce = "merge" if merge.reduce == AUTO and repair and is_normed else merge.reduce
        search = SizeConfig(bits=(), ranks=(), reduce=reduce, min_experts=merge.min_experts)
        total = budget_total(merge.experts, [shared[0].num_experts for shared in groups])
        least = sum(min(choice.experts for choice in _ways(shared[0], search)) for shared in groups)
        if least > total:
            raise ValueError(
                f"experts={merge.experts!r} is {total} experts in all, and the {len(groups)} layers need at least "
                f"{least}, as many in each as a token picks: raise `experts`, or take another budget."
            )
        fitted = NONE if repair is None else repair if repair.method in CLOSED_FORMS else JOINT
        fitted = replace(fitted, sequential=False, method="refit" if is_normed and fitted == JOINT else fitted.method)
        return cls(merge, search, fitted, total)

    def is_covered(self, layers: Layers, statistics: RoutingStatistics) -> bool:
        """Tell whether statistics hold what fewer experts cost."""
        return covered(layers, statistics, self.merge, self.search, self.repair)

    def plans(
        self, layers: Layers, statistics: RoutingStatistics, curves: Mapping[str, LayerCurves]
    ) -> dict[str, MergePlan]:
        """Return by name what is compared: first the plan that curves choose, then those of budgets without curves."""
        firsts = [shared[0] for shared in layers.selected(self.merge.skip).tied]
        # Of a router that does not allow one of them, or does not tell, "auto" has measured the other alone.
        ways = [[way for way in _ways(x, self.search) if curves[x.name].reduced.get(way.reduce)] for x in firsts]
        costs = [_costs(curves[layer.name], own) for layer, own in zip(firsts, ways, strict=True)]
        chosen = cheapest(costs, self.total)
        assert chosen is not None  # as was checked
        choices = {layer.name: own[number] for layer, own, number in zip(firsts, ways, chosen, strict=True)}
        measured = plan_choices(layers, statistics, self.merge, choices)
        return {MEASURED: measured, **_other_plans(layers, statistics, self.merge, self.search, measured)}

    def taken(self, plans: Mapping[str, MergePlan], effects: dict[str, float]) -> MergePlan:
        """Return the plan of least effect, or else the first one.

        Args:
            effects: of the plans, in nats per position, by name; empty where nobody compared them.
        """
        plan = plans[min(effects or plans, key=lambda name: effects.get(name, 0.0))]
        return replace(plan, provenance={**plan.provenance, "config": self.merge.to_dict(), "budgets": effects})


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
        repair: see `Budgeting.of`.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: see `Budgeting.of` and `measure_curves`.
    """
    asked, curves = Budgeting.of(layers, merge, repair), statistics.curves
    if not asked.is_covered(layers, statistics):
        given = layers, statistics, batches, asked.merge, asked.search
        curves = measure_curves(*given, repair=asked.repair, progress=progress)
    plans = asked.plans(layers, statistics, curves)
    return asked.taken(plans, _effects(layers, statistics, plans, batches, asked.repair))


def parted(layers: Layers, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the rows that plans are fitted to, and those that judge them."""
    return parted_rows(list(apart(layers.model, batches)))


def comparing_rows(
    layers: Layers, plans: Mapping[str, MergePlan], batches: Sequence[Batch]
) -> tuple[list[Batch], list[Batch]] | None:
    """Return the rows that plans are fitted to and those that judge them; None without a choice, or rows to judge on.

    Effects of layers are added where a plan is chosen; where much is cut, they do not add up.
    """
    rows, judges = parted(layers, batches)
    return (rows, judges) if len(plans) > 1 and rows and judges else None


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
    """Return the divergence of what each plan makes of the model, fitted, on rows that no fit saw."""
    found = comparing_rows(layers, plans, batches)
    if found is None:
        return {}
    rows, judges = found
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
