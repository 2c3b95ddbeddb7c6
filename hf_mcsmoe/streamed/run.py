"""One run from folder to folder, which goes on from what its journal says is finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import new_record
from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compress import with_steps
from hf_mcsmoe.data.batches import digest
from hf_mcsmoe.data.domains import domains_of
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs, with_flops
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.packing import apart, unpacked
from hf_mcsmoe.layers.shards import ShardWriter
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.options import check_repair
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.processes import ALONE, Processes, working_as
from hf_mcsmoe.progress import Progress, in_parts, one_step
from hf_mcsmoe.record import Costs, Record
from hf_mcsmoe.repair.made import made_batches
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.rows import few_rows
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.sparsity.sparsify import width_of
from hf_mcsmoe.streamed.chain import Asked, Chain
from hf_mcsmoe.streamed.curves import curves_by_blocks
from hf_mcsmoe.streamed.journal import BLOCKS, CURVES, STATISTICS, Journal, sha256_of, source_of_run
from hf_mcsmoe.streamed.parts import ORIGINAL, Course, Rows
from hf_mcsmoe.streamed.states import States
from hf_mcsmoe.streamed.statistics import collect_by_blocks
from hf_mcsmoe.streamed.student import Student, merged_costs
from hf_mcsmoe.streamed.sweep import Sweep

SUMS, PLAN = "statistics.safetensors", "plan.json"


@dataclass(frozen=True)
class Data:
    """The calibration batches of a model, one of them to measure costs on, and the repair that makes rows of them."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    sample: Batch | None
    repair: RepairConfig | None

    def rows(self) -> Rows:
        """Return what passes the blocks."""
        repair, encoder_decoder = self.repair, self.model.config.is_encoder_decoder
        made = made_batches(self.model, self.batches, repair.made, repair.seed) if repair else []
        sample = self.sample and unpacked(self.sample, encoder_decoder=encoder_decoder)
        return Rows(list(apart(self.model, self.batches)), list(apart(self.model, made)), sample)

    @property
    def sequences(self) -> int:
        """How many sequences are fitted to."""
        return sum(map(num_sequences, self.batches))

    def hidden_bytes(self, config: MergeConfig, asked: Asked, judge: Judge) -> int:
        """Return about how many bytes of hidden states wait at a block."""
        streams = 2 if asked.size else 1 + sum(map(bool, asked.stages.values()))
        tokens = sum(_tokens(batch) for batch in self.batches) * (2 if self.repair else 1)
        tokens *= 1 + asked.fitting_streams(config)
        tokens += (1 + streams) * sum(map(_tokens, judge.all_batches))
        counted = 2 if asked.size else 1 + asked.is_stored
        tokens += 0 if self.sample is None else (1 + counted) * _tokens(self.sample)
        return tokens * self._width

    def share_bytes(self, processes: Processes) -> int:
        """Return about how many bytes of hidden states wait in this process in a first sweep that several share."""
        return sum(map(_tokens, processes.own(self.batches))) * self._width

    @property
    def _width(self) -> int:
        """The bytes of a token's hidden state."""
        return self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize


def _tokens(batch: Batch) -> int:
    return max((x.shape[:2].numel() for x in batch.values() if isinstance(x, torch.Tensor)), default=0)


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
    held = None if statistics is None else digest(list(statistics.layers.values()))
    told = {} if statistics is None else {name: item.to_dict() for name, item in statistics.curves.items()}
    return {
        "source": source_of_run(folder),
        "options": {"merge": config.to_dict(), **options, "dtype": str(folder.model.dtype)},
        "data": [digest(part) + digest([_domains(batch) for batch in part]) for part in data],
        "statistics": held,
        "curves": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
        "base_model": None if norms is None else digest([norms]),
        "device": str(folder.device),
        "packages": {name: version(name) for name in ("hf_mcsmoe", "transformers", "torch")},
        "threads": torch.get_num_threads(),
    }


def _domains(batch: Batch) -> dict[str, torch.Tensor]:
    return {"domain": domains_of(batch, num_sequences(batch))}


def shared_statistics(
    layers: Layers, batches: Sequence[Batch], needs: Sequence[str], processes: Processes
) -> RoutingStatistics:
    """Return the sums over all batches, of which each process runs its share."""
    with working_as(processes):
        return collect_statistics(layers, batches, of_data(needs))


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

    def check_source(self) -> None:
        """Raise ValueError where the source has changed since the run began."""
        held, found = self.journal.content["run"]["source"], source_of_run(self.folder)
        if other := [name for name in held if held[name] != found.get(name)]:
            raise ValueError(
                f"{other[0]} of {self.folder.model.name_or_path} has changed while it was read: begin anew when "
                "nobody writes to it (--restart)."
            )

    def statistics(
        self, given: RoutingStatistics | None, needs: Sequence[str], tell: Progress, processes: Processes = ALONE
    ) -> RoutingStatistics:
        """Return the statistics that are given, or those of the first sweep, which several processes share.

        Of the sweep of one process every block that is finished is kept; several begin it again.
        """
        file, is_lacking = self.journal.folder / SUMS, given is None and self.journal.state == STATISTICS
        processes.sent(is_lacking, 0)
        if given is not None:
            return given
        if not is_lacking:
            return RoutingStatistics.load(file)
        if processes.size == 1:
            found = self._first_sweep(of_data(needs), tell)
        else:
            with one_step(STATISTICS, tell):
                found = shared_statistics(self.layers, self.data.batches, needs, processes)
            self.check_source()
        found.save(file)
        return found

    def _first_sweep(self, names: list[str], tell: Progress) -> RoutingStatistics:
        """Return the sums of the first sweep by this process, which goes on from the blocks that are finished."""
        number = len(blocks(self.folder.model))

        def done() -> None:
            self.check_source()
            tell(STATISTICS, len(self.journal.content[STATISTICS]) + 1, number)

        tell(STATISTICS, len(self.journal.content[STATISTICS]), number)
        return collect_by_blocks(self.layers, self.rows.fitted, names, self.states, self.journal, done)

    def curves(
        self, statistics: RoutingStatistics, search: SizeConfig, repair: RepairConfig, tell: Progress
    ) -> RoutingStatistics:
        """Return the statistics with what choices cost: as they hold it, or else from a sweep."""
        if statistics.curves:
            return statistics
        if self.journal.state == STATISTICS:
            self.journal.state = CURVES
        kept, number = self.journal.content.setdefault(CURVES, {}), len(blocks(self.folder.model))
        if not kept:
            self.states.clear()  # of the sweep before

        def done(path: str) -> None:
            self.check_source()
            self.journal.save()
            self.states.forget(path)
            tell(CURVES, len(kept["finished"]), number)

        tell(CURVES, len(kept.get("finished", ())), number)
        options: dict[str, Any] = {"repair": repair, "states": self.states, "kept": kept, "done": done}
        sources = self.layers, statistics, self.data.batches
        found = curves_by_blocks(*sources, self.config, search, **options)
        return replace(statistics, curves=found, conditions=conditions(self.config, search, repair))

    def plan(self, statistics: RoutingStatistics, tell: Progress) -> MergePlan:
        """Return the plan of the statistics."""
        file = self.journal.folder / PLAN
        if self.journal.state == STATISTICS:
            with one_step("planning", tell):
                plan_merge(self.layers, statistics, self.config).save(file)
            self.journal.state = BLOCKS
        methods = [method if callable(method) else None for method in (self.config.alignment, self.config.merging)]
        return replace(MergePlan.load(file), alignment=methods[0], merging=methods[1])

    def blocks(
        self, statistics: RoutingStatistics, plan: MergePlan, judge: Judge, tell: Progress
    ) -> tuple[PreTrainedModel, Record]:
        """Make what is not finished, and return the student without weights and its record, but for the quality."""
        is_merged = any(not item.is_whole for item in plan.layers.values())
        check_repair(is_merged, **self.asked.stages)
        student, chain = Student(self.layers, plan, self._width), Chain(self.layers, plan, statistics, self.asked)
        chain.begin(len(self.rows.fitted))
        if self.asked.low_rank:
            write_description(student.model, keep=self.asked.low_rank.keep)
        sweep = self.swept([Course(student, chain.stages)], judge, tell)
        student.narrow()
        streams = {"merged": chain.stages[0].stream} if self.asked.is_stored and is_merged else {}
        name = "compressed" if self.asked.is_stored else "merged" if is_merged else "after"
        costs = self.costs(sweep, 0, {**streams, name: chain.stages[-1].stream})
        record = replace(new_record(student.model, plan.to_dict()), costs=costs)
        few, asked = few_rows(chain.refitted, self.data.sequences), self.asked
        report, stored = chain.report(self.data.sequences), (asked.low_rank, asked.quantization, asked.sparsity)
        return student.model, with_steps(record, student.model, report, *stored, few)

    @property
    def _width(self) -> int | None:
        """The hidden units of each expert in the end, where some of them go."""
        sparsity = self.asked.sparsity
        return width_of(self.layers[0], sparsity) if sparsity and sparsity.is_units else None

    def swept(self, courses: Sequence[Course], judge: Judge, tell: Progress) -> Sweep:
        """Make what is not finished of some students, each written by the writer of its number."""
        judged = sum(bool(stage.judged) for course in courses for stage in course.stages)
        judge.progress = in_parts("measuring", tell, 1 + judged)
        self.writers = [ShardWriter(_made(self.journal.folder / str(n)), self.folder) for n in range(len(courses))]
        sweep, shards = Sweep(self.folder, courses, self.rows, judge), list[list[str]]()
        finished, number = self._resumed(sweep), len(blocks(self.folder.model))
        tell(BLOCKS, len(finished), number)

        def write(place: int, path: str, module: Any) -> None:
            student = courses[place].student
            file = self.writers[place].write_all(path, module, student.names)
            write_description(student.model)
            shards.append([str(file.relative_to(self.journal.folder)), sha256_of(file)])

        def done(path: str) -> None:
            self.check_source()
            self._finish(path, [*shards], sweep)
            shards.clear()
            tell(BLOCKS, len(self.journal.content[BLOCKS]), number)

        sweep.run(self.states, finished, write, done)
        return sweep

    def _finish(self, path: str, shards: list[list[str]], sweep: Sweep) -> None:
        content = self.journal.content
        content[BLOCKS][path] = shards
        content["descriptions"] = [course.student.model.config.mcsmoe for course in sweep.courses]
        content["told"] = [[stage.told for stage in course.stages] for course in sweep.courses]
        content["inside"] = sweep.inside
        content["experts"] = {stream: counting.experts for stream, counting in sweep.counts.items()}
        self.journal.save()
        self.states.forget(path)

    def _resumed(self, sweep: Sweep) -> list[str]:
        """Give a sweep what the journal knows of finished blocks, whose paths are returned."""
        content, finished = self.journal.content, list(self.journal.content[BLOCKS])
        if not finished:
            self.states.clear()  # of the sweep before
            return []
        for shards in content[BLOCKS].values():
            for writer, (name, digest_of_file) in zip(self.writers, shards, strict=True):
                file = self.journal.folder / name
                if not file.is_file() or sha256_of(file) != digest_of_file:
                    raise ValueError(f"{file} is not what the run has written: begin anew (--restart).")
                writer.take(file)
        for course, description, told in zip(sweep.courses, content["descriptions"], content["told"], strict=True):
            for stage, own in zip(course.stages, told, strict=True):
                stage.told = own
            course.student.resume(description)
        sweep.resume(content["inside"], content["experts"])
        return finished

    def write_rest(self, student: PreTrainedModel, place: int = 0) -> ShardWriter:
        """Write what lies outside of the blocks that were made; returns the student's writer."""
        self.writers[place].write_rest(student)
        self.check_source()
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
