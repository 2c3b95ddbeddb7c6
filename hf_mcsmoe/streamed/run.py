"""One run from folder to folder, which goes on from what its journal says is finished."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import digest
from hf_mcsmoe.data.domains import domains_of
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs, with_flops
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.shards import ShardWriter
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.processes import Processes
from hf_mcsmoe.progress import Progress, in_parts
from hf_mcsmoe.record import Costs
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.streamed.chain import Asked
from hf_mcsmoe.streamed.curves import curves_by_blocks
from hf_mcsmoe.streamed.data import Data
from hf_mcsmoe.streamed.journal import (
    BLOCKS,
    BUDGETS,
    CURVES,
    STATISTICS,
    Journal,
    sha256_of,
    source_of_run,
)
from hf_mcsmoe.streamed.parts import ORIGINAL, Course, Rows
from hf_mcsmoe.streamed.states import States
from hf_mcsmoe.streamed.statistics import SUMS, forget_others
from hf_mcsmoe.streamed.student import merged_costs
from hf_mcsmoe.streamed.sweep import Sweep

PLAN = "plan.json"


def description_of(
    folder: Folder,
    config: MergeConfig,
    asked: Asked,
    data: Sequence[Sequence[Batch]],
    statistics: RoutingStatistics | None,
    norms: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Return what decides on the bytes of a result, as JSON values; `norms` are those of a reference's routers."""
    options = {name: None if value is None else value.to_dict() for name, value in vars(asked).items()}
    return {
        "source": source_of_run(folder),
        "options": {"merge": config.to_dict(), **options, "dtype": str(folder.model.dtype)},
        "data": [digest(part) + digest([_domains(batch) for batch in part]) for part in data],
        **digests_of(statistics),
        "base_model": None if norms is None else digest([norms]),
        "device": str(folder.device),
        "packages": {name: version(name) for name in ("hf_mcsmoe", "transformers", "torch")},
        "threads": torch.get_num_threads(),
    }


def digests_of(statistics: RoutingStatistics | None) -> dict[str, str | None]:
    """Return what tells statistics from any others, as JSON values."""
    held = None if statistics is None else digest(list(statistics.layers.values()))
    told = {} if statistics is None else {name: item.to_dict() for name, item in statistics.curves.items()}
    return {"statistics": held, "curves": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}


def _domains(batch: Batch) -> dict[str, torch.Tensor]:
    return {"domain": domains_of(batch, num_sequences(batch))}


class Run:
    """A run, and its journal."""

    def __init__(
        self, layers: Layers, config: MergeConfig, asked: Asked, data: Data, journal: Journal, *, is_mapped: bool
    ) -> None:
        """Begin, or go on."""
        self.layers, self.config, self.asked, self.data, self.journal = layers, config, asked, data, journal
        self.folder = cast(Folder, layers.source)
        self.folder.model.requires_grad_(False)
        self.rows = data.rows()
        self.states = States(journal.folder, list(blocks(self.folder.model)), mapped=is_mapped)
        self.writers: list[ShardWriter] = []

    def statistics(
        self, given: RoutingStatistics | None, sweep: Callable[[], RoutingStatistics], processes: Processes
    ) -> RoutingStatistics:
        """Return the statistics that are given, or those of the first sweep, which several processes share.

        Args:
            sweep: does this process's part of it, see `first_sweep`, and the others theirs meanwhile.
        """
        is_lacking = given is None and not (self.journal.folder / SUMS).is_file()
        if is_lacking:
            forget_others(self.journal.folder, processes)
        processes.sent(is_lacking, 0)
        if given is not None:
            return given
        return sweep() if is_lacking else RoutingStatistics.load(self.journal.folder / SUMS)

    def curves(
        self,
        statistics: RoutingStatistics,
        merge: MergeConfig,
        search: SizeConfig,
        repair: RepairConfig,
        tell: Progress,
    ) -> dict[str, LayerCurves]:
        """Return what choices cost, from a sweep."""
        if self.journal.state == STATISTICS:
            self.journal.state = CURVES
        kept, number = self.journal.content.setdefault(CURVES, {}), len(blocks(self.folder.model))
        if not kept:
            self.states.clear()  # of the sweep before

        def done(path: str) -> None:
            self.journal.check_source(self.folder)
            self.journal.save()
            self.states.forget(path)
            tell(CURVES, len(kept["finished"]), number)

        tell(CURVES, len(kept.get("finished", ())), number)
        options: dict[str, Any] = {"repair": repair, "states": self.states, "kept": kept, "done": done}
        sources = self.layers, statistics, self.data.batches
        return curves_by_blocks(*sources, merge, search, **options)

    def plan(self, decide: Callable[[], MergePlan], then: str = BLOCKS) -> MergePlan:
        """Return the plan that was decided on, or is now.

        Args:
            then: the state that begins when it is known.
        """
        file = self.journal.folder / PLAN
        if self.journal.state in (STATISTICS, CURVES, BUDGETS):
            decide().save(file)
            self.journal.state = then
        methods = [method if callable(method) else None for method in (self.config.alignment, self.config.merging)]
        return replace(MergePlan.load(file), alignment=methods[0], merging=methods[1])

    def swept(
        self,
        courses: Sequence[Course],
        judge: Judge,
        tell: Progress,
        *,
        state: str = BLOCKS,
        rows: Rows | None = None,
    ) -> Sweep:
        """Make what is not finished of some students, each written by the writer of its number.

        Args:
            state: that the run is in: in one before `BLOCKS` what is made is looked at alone, and not written.
            rows: what passes; None for what passes in `BLOCKS`.
        """
        folders = list[Path]()
        if state == BLOCKS:
            judged = sum(bool(stage.judged) for course in courses for stage in course.stages)
            judge.progress = in_parts("measuring", tell, 1 + judged)
            folders = [self.journal.folder / str(number) for number in range(len(courses))]
        self.writers = [ShardWriter(_made(folder), self.folder) for folder in folders]
        sweep, shards = Sweep(self.folder, courses, rows or self.rows, judge), list[list[str]]()
        kept, number = self.journal.content.setdefault(state, {}), len(blocks(self.folder.model))
        finished = self._resumed(sweep, kept)
        tell(state, len(finished), number)

        def write(place: int, path: str, module: Any) -> None:
            student = courses[place].student
            if self.writers:
                file = self.writers[place].write_all(path, module, student.names)
                shards.append([str(file.relative_to(self.journal.folder)), sha256_of(file)])
            write_description(student.model)

        def done(path: str) -> None:
            self.journal.check_source(self.folder)
            kept.setdefault("finished", {})[path] = [*shards]
            shards.clear()
            self._finish(path, sweep, kept)
            tell(state, len(kept["finished"]), number)

        sweep.run(self.states, finished, write, done)
        return sweep

    def _finish(self, path: str, sweep: Sweep, kept: dict[str, Any]) -> None:
        kept["descriptions"] = [course.student.model.config.mcsmoe for course in sweep.courses]
        kept["told"] = [[stage.told for stage in course.stages] for course in sweep.courses]
        kept["inside"] = sweep.inside
        kept["experts"] = {stream: counting.experts for stream, counting in sweep.counts.items()}
        self.journal.save()
        self.states.forget(path)

    def _resumed(self, sweep: Sweep, kept: dict[str, Any]) -> list[str]:
        """Give a sweep what is known of finished blocks, whose paths are returned."""
        finished = list(kept.get("finished", ()))
        if not finished:
            self.states.clear()  # of the sweep before
            return []
        for shards in kept["finished"].values():
            for writer, (name, digest_of_file) in zip(self.writers, shards, strict=True):
                file = self.journal.folder / name
                if not file.is_file() or sha256_of(file) != digest_of_file:
                    raise ValueError(f"{file} is not what the run has written: begin anew (--restart).")
                writer.take(file)
        for course, description, told in zip(sweep.courses, kept["descriptions"], kept["told"], strict=True):
            for stage, own in zip(course.stages, told, strict=True):
                stage.told = own
            course.student.resume(description)
        sweep.resume(kept["inside"], kept["experts"])
        return finished

    def write_rest(self, student: PreTrainedModel, place: int = 0) -> ShardWriter:
        """Write what lies outside of the blocks that were made; returns the student's writer."""
        self.writers[place].write_rest(student)
        self.journal.check_source(self.folder)
        return self.writers[place]

    def costs(self, sweep: Sweep, place: int, streams: Mapping[str, str]) -> dict[str, Costs]:
        """Return what the original costs, and a student as it is in some streams, "merged" or the last, by name."""
        student, (*early, last) = sweep.courses[place].student, streams
        before = replace(account(self.layers), bytes_on_disk=folder_bytes(self.layers.model.name_or_path))
        costs = {"before": before, **{name: merged_costs(self.layers, student.plan) for name in early}}
        costs[last] = replace(account(student.model), bytes_on_disk=saved_costs(student.model).bytes_on_disk)
        if (sample := self.rows.sample) is None:
            return costs
        streams = {"before": ORIGINAL, **streams}
        flops = {name: (sweep.flops(stream), sweep.counts[stream].experts) for name, stream in streams.items()}
        return {name: with_flops(value, self.layers.model, sample, *flops[name]) for name, value in costs.items()}


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
