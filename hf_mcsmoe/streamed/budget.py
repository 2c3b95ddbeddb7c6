"""The measured budget block by block: curves of fewer experts, and the plans that are compared side by side."""

from collections.abc import Mapping

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.budget import OTHERS, Budgeting, comparing_rows, parted
from hf_mcsmoe.search.probe import MEMORY_LIMIT
from hf_mcsmoe.streamed.chain import may_be_cut
from hf_mcsmoe.streamed.data import Data
from hf_mcsmoe.streamed.journal import BUDGETS, CURVES, STATISTICS
from hf_mcsmoe.streamed.parts import Course, Stage
from hf_mcsmoe.streamed.run import Run
from hf_mcsmoe.streamed.stages import Merging, Repairing
from hf_mcsmoe.streamed.student import Student


def plan_by_blocks(run: Run, statistics: RoutingStatistics, tell: Progress) -> MergePlan:
    """Do what `measured_plan` does, and keep what is finished.

    Raises:
        ValueError: see `measured_plan`.
    """
    asked, curves = Budgeting.of(run.layers, run.config, run.asked.repair), statistics.curves
    if not asked.is_covered(run.layers, statistics):
        curves = run.curves(statistics, asked.merge, asked.search, asked.repair, tell)
    plans = asked.plans(run.layers, statistics, curves)
    return asked.taken(plans, _effects(run, statistics, plans, asked, tell))


def _effects(
    run: Run, statistics: RoutingStatistics, plans: Mapping[str, MergePlan], asked: Budgeting, tell: Progress
) -> dict[str, float]:
    """Return the divergence of what each plan makes of the model, fitted, on rows that no fit saw, from one sweep."""
    found = comparing_rows(run.layers, plans, run.data.batches)
    if found is None:
        return {}
    if run.journal.state in (STATISTICS, CURVES):
        run.journal.state = BUDGETS
    (rows, judges), repair = found, None if asked.repair.method == "none" else asked.repair
    courses = [
        Course(Student(run.layers, plan), _stages(f"budget {number}", name, plan, statistics, repair))
        for number, (name, plan) in enumerate(plans.items())
    ]
    judge = Judge(judges, memory_limit=MEMORY_LIMIT)
    run.swept(courses, judge, tell, state=BUDGETS, rows=Data(run.data.model, rows, None, repair).rows())
    return {name: kl for name in plans if name in judge.quality and (kl := judge.quality[name].kl) is not None}


def _stages(
    stream: str, name: str, plan: MergePlan, statistics: RoutingStatistics, repair: RepairConfig | None
) -> list[Stage]:
    """Return what makes of the model what a plan says, of which the last is judged by the plan's name."""
    merged = [layer for layer, item in plan.layers.items() if not item.is_whole]
    stages: list[Stage] = [Merging(f"{stream} merged", merged, statistics=statistics)]
    if repair and merged:
        is_cut = any(item.kept is not None for item in plan.layers.values())
        stages.append(Repairing(f"{stream} repaired", merged, config=repair, may_be_cut=is_cut))
    stages[-1].judged = name
    return stages


def compared_bytes(layers: Layers, data: Data, config: MergeConfig, asked: Budgeting) -> int:
    """Return about how many bytes of hidden states wait at a block while plans are compared, at most."""
    rows, judges = parted(layers, data.batches)
    plans = 1 + len(OTHERS) * len(asked.search.reductions)
    if asked.repair.method == "none":
        return (1 + plans) * data.bytes_of(judges)
    fitted = data.bytes_of(rows) * (2 if asked.repair.made else 1) * (1 + (plans if may_be_cut(config) else 0))
    return fitted + (1 + plans) * data.bytes_of(judges)
