"""A result of a size, block by block: what is tried for it is made side by side, and the best is taken."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from transformers import PreTrainedModel

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.record import Record
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.rows import few_rows
from hf_mcsmoe.search.apply import is_converted, plan_choices
from hf_mcsmoe.search.choices import Chosen
from hf_mcsmoe.search.compress import (
    Sized,
    after_balance,
    best_of,
    check_size,
    compared,
    record_of_size,
    shared_bits,
    source_bytes,
)
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.streamed.journal import BLOCKS, CURVES, STATISTICS
from hf_mcsmoe.streamed.parts import Course
from hf_mcsmoe.streamed.run import Run
from hf_mcsmoe.streamed.stages import Merging, Storing
from hf_mcsmoe.streamed.student import Student


def with_curves(run: Run, statistics: RoutingStatistics, tell: Progress) -> RoutingStatistics:
    """Return the statistics with what choices for a size cost: as they hold it, or else from a sweep."""
    if statistics.curves:
        return statistics
    merge, search, repair = run.config, cast(SizeConfig, run.asked.size), run.asked.repair or JOINT
    curves = run.curves(statistics, merge, search, repair, tell)
    return replace(statistics, curves=curves, conditions=conditions(merge, search, repair))


def made_to_size(
    run: Run, statistics: RoutingStatistics, judge: Judge, tell: Progress
) -> tuple[PreTrainedModel, Record, int]:
    """Do what `compress_to_size` does, and keep what is finished.

    Args:
        statistics: with curves.

    Returns:
        The student that is taken, without weights; its record, but for data and quality; and its number.
    """
    layers, merge, search = run.layers, run.config, cast(SizeConfig, run.asked.size)
    limit, repair = check_size(layers, merge, search), run.asked.repair or JOINT
    curves = statistics.curves
    chosen = compared(layers, curves, search, limit, merge.skip)
    courses, stored = list[Course](), list[Storing]()
    for name, item in chosen.items():
        course, storing = _course(run, f"tried {len(courses)}", item, statistics, repair)
        storing.judged, storing.bits = name, shared_bits(name, search)
        courses.append(course)
        stored.append(storing)
    if run.journal.state in (STATISTICS, CURVES):
        run.journal.state = BLOCKS
    sweep, results = run.swept(courses, judge, tell), dict[str, Sized]()
    for (name, item), course, storing in zip(chosen.items(), courses, stored, strict=True):
        student, quality = course.student, judge.quality.pop(name, None)
        item = replace(item, predicted=after_balance(item, curves, storing.gains))
        few = few_rows(storing.fitted, run.data.sequences)
        results[name] = Sized(student.model, student.plan, item, quality, few)
    taken = best_of(results)
    best, place = results[taken], list(results).index(taken)
    judge.quality |= {} if best.quality is None else {"compressed": best.quality}
    costs = run.costs(sweep, place, {"compressed": stored[place].stream})
    costs["before"] = replace(costs["before"], bytes_on_disk=source_bytes(layers))
    record = record_of_size(layers, results, taken, curves, merge, search, repair)
    return best.model, replace(record, costs=costs), place


def _course(
    run: Run, stream: str, chosen: Chosen, statistics: RoutingStatistics, repair: RepairConfig
) -> tuple[Course, Storing]:
    """Return what makes of the model what is chosen, and the last of its stages."""
    plan = plan_choices(run.layers, statistics, run.config, chosen.choices)
    merged = [name for name, item in plan.layers.items() if not item.is_whole]
    names: Sequence[str] = [name for name in plan.layers if name in merged or is_converted(chosen.choices[name])]
    storing = Storing(
        stream,
        names,
        is_counted=True,
        config=repair,
        may_be_cut=any(item.kept is not None for item in plan.layers.values()),
        choices=chosen.choices,
    )
    merging = Merging(f"{stream} merged", merged, statistics=statistics)
    return Course(Student(run.layers, plan), [merging, storing]), storing
