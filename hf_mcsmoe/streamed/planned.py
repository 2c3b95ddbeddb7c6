"""A result of as many experts as a plan says, block by block: the plan, ranks that compete, and the last sweep."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import new_record
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compress import with_steps
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import layer_ranks
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.options import check_repair
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.progress import Progress, one_step
from hf_mcsmoe.record import Record
from hf_mcsmoe.repair.rows import few_rows
from hf_mcsmoe.sparsity.sparsify import width_of
from hf_mcsmoe.streamed.budget import plan_by_blocks
from hf_mcsmoe.streamed.chain import Chain
from hf_mcsmoe.streamed.journal import BLOCKS, RANKS
from hf_mcsmoe.streamed.parts import Course, Stage
from hf_mcsmoe.streamed.run import Run
from hf_mcsmoe.streamed.stages import Decomposing, Weighing
from hf_mcsmoe.streamed.student import Student


def made_by_plan(
    run: Run, statistics: RoutingStatistics, judge: Judge, tell: Progress
) -> tuple[PreTrainedModel, Record]:
    """Make what is not finished, and return the student without weights and its record, but for the quality."""
    layers, asked = run.layers, run.asked
    competes = asked.low_rank is not None and asked.low_rank.scope == "global"
    plan = run.plan(partial(_decided, run, statistics, tell), RANKS if competes else BLOCKS)
    is_merged = any(not item.is_whole for item in plan.layers.values())
    check_repair(is_merged, **asked.stages)
    ranks = _ranks(run, plan, statistics, asked.low_rank, tell) if asked.low_rank and competes else None
    student, chain = _student(run, plan), Chain(layers, plan, statistics, asked, ranks)
    chain.begin(len(run.rows.fitted))
    if asked.low_rank:
        write_description(student.model, keep=asked.low_rank.keep)
    sweep = run.swept([Course(student, chain.stages)], judge, tell)
    student.narrow()
    streams = {"merged": chain.stages[0].stream} if asked.is_stored and is_merged else {}
    name = "compressed" if asked.is_stored else "merged" if is_merged else "after"
    costs = run.costs(sweep, 0, {**streams, name: chain.stages[-1].stream})
    record = replace(new_record(student.model, plan.to_dict()), costs=costs)
    report, stored = chain.report(run.data.sequences), (asked.low_rank, asked.quantization, asked.sparsity)
    few = few_rows(chain.refitted, run.data.sequences)
    return student.model, with_steps(record, student.model, report, *stored, few)


def _decided(run: Run, statistics: RoutingStatistics, tell: Progress) -> MergePlan:
    """Return the plan of the statistics."""
    if run.config.budget == MEASURED:
        return plan_by_blocks(run, statistics, tell)
    with one_step("planning", tell):
        return plan_merge(run.layers, statistics, run.config)


def _student(run: Run, plan: MergePlan) -> Student:
    """Return the model that a plan makes of the original; with narrower experts where hidden units go."""
    sparsity = run.asked.sparsity
    return Student(run.layers, plan, width_of(run.layers[0], sparsity) if sparsity and sparsity.is_units else None)


def _ranks(
    run: Run, plan: MergePlan, statistics: RoutingStatistics, config: LoSparseConfig, tell: Progress
) -> Mapping[str, dict[str, int]]:
    """Return the ranks of each layer by its name before, where the weights of all layers compete for them.

    All that comes before low rank is done in a sweep of its own, of which nothing but singular values is kept.

    Raises:
        ValueError: see `layer_ranks`.
    """
    kept: dict[str, Any] = run.journal.content.setdefault(RANKS, {})
    if "ranks" not in kept:
        student, stages = _student(run, plan), list[Stage]()
        for stage in Chain(run.layers, plan, statistics, run.asked).stages:
            if isinstance(stage, Decomposing):
                stages.append(Weighing("weighed", stage.names))
                break
            stages.append(replace(stage, judged="", is_counted=False))
        run.swept([Course(student, stages)], Judge([]), tell, state=RANKS, rows=replace(run.rows, sample=None))
        told = stages[-1].told
        layers = [layer for layer in student.layers if layer.original_name in told]
        ranks = layer_ranks(layers, config, lambda layer: _tensors(told[layer.original_name]))
        kept["ranks"] = {layer.original_name: own for layer, own in zip(layers, ranks, strict=True)}
        run.journal.state = BLOCKS
    return kept["ranks"]


def _tensors(told: Mapping[str, list[float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in told.items()}
