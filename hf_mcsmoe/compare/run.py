"""The comparison: every method at every level, one pass of statistics a draw, each result judged on the same rows."""

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.reference import with_reference
from hf_mcsmoe.calibration.scores import extended
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compare.bench import Bench
from hf_mcsmoe.compare.cells import Cell
from hf_mcsmoe.compare.grid import (
    Draw,
    Grid,
    check_given,
    check_statistics,
    conditions_of,
    norms_of,
    planned,
    sentence_of,
)
from hf_mcsmoe.compare.journal import SCORES, Journal
from hf_mcsmoe.compare.memory import peak_memory
from hf_mcsmoe.compare.page import ORIGINAL, write_outputs
from hf_mcsmoe.compare.results import remove_results, result
from hf_mcsmoe.compare.ways import Task, needed
from hf_mcsmoe.evaluation.costs import saved_bytes, saved_costs
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import Source
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.modeling.folders_mcsmoe import working_folder
from hf_mcsmoe.progress import Progress, silent
from hf_mcsmoe.search.conditions import covered
from hf_mcsmoe.search.config import AUTO, JOINT, SizeConfig
from hf_mcsmoe.streamed.curves import add_curves
from hf_mcsmoe.tables import outcome

# What of one method is told in its cells, and leaves the others alone.
FAILURES = (ValueError, TypeError, RuntimeError, NotImplementedError)
Metric = Callable[[PreTrainedModel | Source], Mapping[str, float]]


@dataclass(frozen=True)
class Comparison:
    """What was compared, as it lies in its folder."""

    folder: Path
    conditions: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)


def compare(
    model: PreTrainedModel | Layers,
    draws: Mapping[int, Sequence[Batch] | Draw],
    texts: Mapping[str, Sequence[Batch]],
    grid: Grid,
    output: str | os.PathLike,
    *,
    statistics: RoutingStatistics | None = None,
    metric: Metric | None = None,
    metric_of: str = "",
    overwrite: bool = False,
    progress: Progress = silent,
    told: Callable[[list[Cell]], None] | None = None,
) -> Comparison:
    """Compare methods at several levels, and write the cells into a folder; those that lie there already are kept.

    Args:
        model: the original, or its layers where they are found already; it is left as it was. Layers of a `Folder` are
            read block by block, and so is every result, which lies beside `output` until it is judged: then the errors
            of layers are not measured.
        draws: calibration batches by the seed of their draw; statistics are collected once for each. Methods that are
            random take this seed, unless they are given one.
        texts: batches that judge, by the name of their text, the calibrated kind first. Nothing is fitted to them.
        output: written are `cells.jsonl` (cell by cell), `compare.csv`, `compare.json` and `report.html`.
        statistics: of the only draw, instead of a pass.
        metric: called with each result, for figures of a task; with its `Folder` where it is read block by block.
        metric_of: what that measures, e.g. a task and a hash of its rows: all cells of a folder are of the same.
        overwrite: begin anew in a folder that holds a comparison.
        progress: called as `progress(stage, done, total)`, "cells" among the stages.
        told: called with all cells whenever one is finished.

    Raises:
        ValueError: no draw or no text; a folder of something else, or of a comparison under other conditions;
            statistics of another model, or without a sum that a method reads; no cell that can be made. A single cell
            that cannot be made is told in the results.
    """
    layers = Layers.of(model).uncompressed()
    check_given(layers, draws, texts, statistics)
    parted = {seed: Draw.of(seed, batches) for seed, batches in draws.items()}
    found = conditions_of(layers, parted, texts, grid) | {"metric": metric_of or ("a metric" if metric else None)}
    with working_folder(Path(os.path.realpath(output))) as work:
        journal = Journal(Path(output)) if overwrite else Journal.read(output)
        journal.check(found)
        tasks, refused = planned(layers, grid, statistics, by_blocks=isinstance(layers.source, Folder))
        check_statistics(statistics, tasks)
        norms = norms_of(layers, grid, tasks)
        journal.begin(found, anew=overwrite)
        for seed in draws:
            for way, level, sentence in refused:
                if (way.name, str(level), seed) not in journal.cells:
                    journal.append(Cell(way.name, str(level), seed, error=sentence))
        run = _Run(layers, texts, journal, work, metric, progress, told, norms)
        run.all_of(tasks, parted, statistics)
        remove_results(work)
        write_outputs(journal)
        return Comparison(journal.folder, journal.conditions, list(journal.cells.values()))


def _failed(task: Task, seed: int, error: str) -> Cell:
    """Return the cell of a method that could not be tried."""
    return Cell(task.way.name, str(task.level), seed, asked=task.asked, error=error)


@dataclass
class _Run:
    """A comparison under way."""

    layers: Layers
    texts: Mapping[str, Sequence[Batch]]
    journal: Journal
    work: Path
    metric: Metric | None
    progress: Progress
    told: Callable[[list[Cell]], None] | None
    norms: Mapping[str, torch.Tensor] | None = None
    bench: Bench | None = None

    def all_of(self, tasks: Sequence[Task], draws: Mapping[int, Draw], statistics: RoutingStatistics | None) -> None:
        """Make the cells that are not there yet, or failed, draw by draw."""
        keys = [(task, seed) for seed in draws for task in tasks]
        left = [(task, seed) for task, seed in keys if self._is_open(task, seed)]
        self._tell(len(keys) - len(left), len(keys))
        done = len(keys) - len(left)
        for seed, draw in draws.items():
            own = [task for task, other in left if other == seed]
            if not own:
                continue
            self.bench = self.bench or self._bench()
            failed = self._collected(draw, own, statistics)
            file = None if statistics else self.journal.folder / SCORES.format(seed=seed)
            # What is cheap comes first.
            for task in sorted(own, key=lambda task: task.needs_curves):
                why = failed.get(task.way.name)
                known = [other for other in own if other.way.name not in failed]
                measure = partial(self._measure_curves, draw, known, file)
                self.journal.append(_failed(task, seed, why) if why else self.cell(draw, task, measure))
                done += 1
                self._tell(done, len(keys))

    def _bench(self) -> Bench:
        """Return what judges, and tell what the original is worth."""
        bench, model = Bench(self.layers, self.texts, self.progress), self.layers.model
        cell = Cell(ORIGINAL, "as it is", 0, "", model.num_parameters(), saved_bytes(model), texts=bench.original)
        if cell.key not in self.journal.cells:
            self.journal.append(cell)
        return bench

    def _is_open(self, task: Task, seed: int) -> bool:
        cell = self.journal.cells.get((task.way.name, str(task.level), seed))
        return cell is None or bool(cell.error)

    def _tell(self, done: int, total: int) -> None:
        write_outputs(self.journal)
        self.progress("cells", done, total)
        if self.told:
            self.told(list(self.journal.cells.values()))

    def _collected(self, draw: Draw, tasks: Sequence[Task], given: RoutingStatistics | None) -> dict[str, str]:
        """Give a draw the sums that methods read; return why some have none, by the method's name.

        They are collected together, and only where that fails method by method. Those that are given must do.
        """
        try:
            draw.statistics = self._statistics(draw, tasks, given)
        except FAILURES:
            if given is not None:
                raise
        else:
            return {}
        failed = {}
        for task in {task.way.name: task for task in tasks}.values():
            try:
                draw.statistics = self._statistics(draw, [task], given)
            except FAILURES as error:
                failed[task.way.name] = sentence_of(error)
        return failed

    def _statistics(self, draw: Draw, tasks: Sequence[Task], given: RoutingStatistics | None) -> RoutingStatistics:
        """Return the sums that the methods read, in one pass, or what an earlier run has kept of them."""
        file = self.journal.folder / SCORES.format(seed=draw.seed)
        held = draw.statistics or given or (RoutingStatistics.load(file) if file.exists() else None)
        found = extended(self.layers, draw.fitted, held, of_data(needed(tasks)), self.progress, self.work)
        found = found if self.norms is None else with_reference(found, self.layers, self.norms)
        if given is None and found is not held:
            found.save(file)
        return found

    def _measure_curves(self, draw: Draw, tasks: Sequence[Task], file: Path | None) -> None:
        """Measure once what choices cost, for all sizes that are searched for, and keep it in `file`."""
        searches = [task.options["size"] for task in tasks if task.options.get("size")]
        statistics = draw.statistics
        measured = [task for task in tasks if task.needs_curves]
        if not measured or statistics is None:
            return
        reduces = {AUTO if task.options.get("size") else task.options["config"].reduce for task in measured}
        bits = [bits for search in searches for bits in search.bits]
        widest = replace(
            max(searches, key=lambda search: len(search.bits), default=SizeConfig(bits=(), ranks=())),
            bits=tuple(sorted(set(bits), reverse=True)),
            reduce=reduces.pop() if len(reduces) == 1 else AUTO,
        )
        if covered(self.layers, statistics, MergeConfig(), widest, JOINT):
            return

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            add_curves(self.layers, draw.fitted, statistics, MergeConfig(), widest, self.progress, self.work)
        if file:
            statistics.save(file)

    def cell(self, draw: Draw, task: Task, measure_curves: Callable[[], None]) -> Cell:
        """Make a result and judge it; where it cannot be made, the cell tells why.

        Args:
            measure_curves: measures what choices cost, for a method that needs to know.
        """
        cell = Cell(task.way.name, str(task.level), draw.seed, asked=task.asked)
        with warnings.catch_warnings(record=True) as said, ExitStack() as stack:
            warnings.simplefilter("always")
            try:
                if task.needs_curves:
                    measure_curves()
                begin = time.perf_counter()
                peak = stack.enter_context(peak_memory(self.layers.model.device))
                made = stack.enter_context(result(self.layers, draw, task, self.work))
                student = made.source.model
                seconds, memory = time.perf_counter() - begin, peak()
                costs = saved_costs(student)
                cell = replace(
                    cell,
                    done=outcome(made.record.layers),
                    parameters=costs.parameters,
                    bytes=costs.bytes_on_disk,
                    seconds=seconds,
                    memory=memory,
                    **self._judged(made.source),
                )
                if not cell.is_finite:
                    raise ValueError(
                        f"The result overflows in {student.dtype}: load the model in bfloat16 or float32."
                    )
            except FAILURES as error:
                cell = _failed(task, draw.seed, sentence_of(error))
        return replace(cell, notes=list(dict.fromkeys(sentence_of(item.message) for item in said)))  # type: ignore[arg-type]

    def _judged(self, made: Source) -> dict[str, Any]:
        assert self.bench is not None
        found: dict[str, Any] = {"texts": self.bench.figures(made), "layers": self.bench.layer_errors(made.model)}
        whole = made if isinstance(made, Folder) else made.model
        return found | ({"metrics": dict(self.metric(whole))} if self.metric else {})
