"""`hf-mcsmoe compare`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.display import Sheet, Stages, console, notes, stage_bars, unstarted_bars
from hf_mcsmoe.cli.options import (
    CLAIMS,
    Loading,
    Model,
    check_device_map,
    check_dtype,
    described,
    options_of,
    parse_experts,
)
from hf_mcsmoe.cli.scores import read_scores
from hf_mcsmoe.cli.shares import Shared, parsed
from hf_mcsmoe.cli.sources import Calibration, public_names
from hf_mcsmoe.cli.streaming import opened
from hf_mcsmoe.compare.cells import Cell, rows_of
from hf_mcsmoe.compare.grid import Draw, Grid, norms_of, planned
from hf_mcsmoe.compare.journal import Journal
from hf_mcsmoe.compare.page import ORIGINAL
from hf_mcsmoe.compare.run import compare
from hf_mcsmoe.compare.ways import needed
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.data.tasks import Task, get_task, task_rows
from hf_mcsmoe.evaluation.quality import evaluate_task
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.layers.output import check_apart
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.methods.choice import BITS
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.modeling.folders_mcsmoe import working_folder
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.progress import Progress, one_step, silent
from hf_mcsmoe.report.words import figure, size
from hf_mcsmoe.streamed.config import StreamConfig

Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Texts(Calibration):
    """The text that methods read, and the texts that judge."""

    eval: str | None = described(None, "text that judges, of the kind that --data is of; nothing is fitted to it")
    eval_samples: int = described(64, "samples of --eval and of each --check-data", min=1)
    seeds: int = described(1, "draws of the calibration text; figures are means over them", min=1)

    def __post_init__(self) -> None:
        """Refuse what judges nothing.

        Raises:
            ValueError: no text to judge on, or one that is calibration text as well.
        """
        if self.eval is None:
            raise ValueError("--eval names the text that judges: give some of the kind of --data, but other rows.")
        super().__post_init__()
        fitted = {_place(name) for name, _ in parsed(self.data)}
        judging = [_place(name) for name, _ in parsed([self.eval, *(self.check_data or [])])]
        for name, place in zip([self.eval, *(self.check_data or [])], judging, strict=True):
            if place in fitted:
                raise ValueError(f"{name} is --data as well, which methods read: name other rows to judge on.")
            if judging.count(place) > 1:
                raise ValueError(f"{name} is named twice among --eval and --check-data: name each text once.")

    @property
    def judging(self) -> dict[str, str]:
        """The texts that judge, by the names that they are told by."""
        given = [str(self.eval), *(self.check_data or [])]
        names = [public_names([name])[0] for name in given]
        return dict(zip(names if len(set(names)) == len(names) else given, given, strict=True))

    def read_judging(self) -> dict[str, list[Shared]]:
        """Return the samples of each text that judges."""
        return {name: self._read([given], silent) for name, given in self.judging.items()}

    def drawn(
        self, data: list[Shared], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, progress: Progress
    ) -> dict[int, Draw]:
        """Return the calibration text as batches by the seed of their draw."""
        draws = {}
        for seed in range(self.seed, self.seed + self.seeds):
            fitted, held_out = replace(self, seed=seed).batches(data, tokenizer, model, progress)
            draws[seed] = Draw(seed, fitted, held_out)
        return draws

    def judges(
        self, texts: Mapping[str, list[Shared]], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> dict[str, Batches]:
        """Return the rows that judge as batches by the name of their text, the same for all draws."""
        found = {}
        for name, data in texts.items():
            told = f"judged on {name}:"
            features = self._features(data, tokenizer, model, self.eval_samples, told, silent)
            found[name] = feature_batches(features, tokenizer, self.batch_size, by_length=False)
        return found


def _place(name: str) -> str:
    """Return where data lie, by which the same are known under two names."""
    return os.path.realpath(os.path.expanduser(name)) if Path(name).expanduser().exists() else name


LEVELS = "0.75,0.5,0.25"


@dataclass(frozen=True)
class Chosen:
    """What is compared."""

    methods: str = described("all", f"presets to compare, with commas, or all: {', '.join(PRESETS)}")
    experts: str | None = described(
        None, "shares or numbers of experts to keep, with commas", show_default=f"{LEVELS}; with --sizes none"
    )
    sizes: str | None = described(None, "sizes of the weight files, with commas (20GB,0.25)")
    base_model: str | None = described(None, "checkpoint that the model was trained from, for router-norm")
    bits: str | None = described(None, f"bits a weight of experts beside every method: {', '.join(map(str, BITS))}")

    def grid(self) -> Grid:
        """Return what is compared.

        Raises:
            ValueError: a method that there is not, or a level that is none.
        """
        if self.bits is not None and self.bits not in map(str, BITS):
            raise ValueError(f"--bits {self.bits} must be one of {', '.join(map(str, BITS))}.")
        levels = self.experts if self.experts is not None or self.sizes else LEVELS
        experts = [parse_experts(value) for value in _split(levels)]
        bits = None if self.bits is None else int(self.bits)
        return Grid(_split(self.methods), experts, _split(self.sizes), bits, self.base_model)


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


@options_of(Texts, "texts", panel="Data")
@options_of(Chosen, "chosen", panel="Methods")
@options_of(Loading, "loading", panel="Loading")
def compare_command(
    model: Model,
    texts: Texts,
    chosen: Chosen,
    loading: Loading,
    output: Annotated[
        Path, typer.Option(help="folder of the comparison; one that is there goes on", rich_help_panel="Output")
    ],
    overwrite: Annotated[
        bool, typer.Option(help="begin anew in a folder that holds a comparison", rich_help_panel="Output")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="file of statistics, as `calibrate` writes it", rich_help_panel="Data")
    ] = None,
    stream: Annotated[
        bool, typer.Option(help="read the model and each result block by block", rich_help_panel="Loading")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="a task whose metrics are measured as well", rich_help_panel="Data")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with the task's rows, or a file of them", rich_help_panel="Data")
    ] = None,
) -> None:
    """Compare methods at several sizes on the same text, in and out of the calibrated kinds; a stopped run goes on."""
    check_device_map(loading.device_map)
    check_dtype(loading.dtype)
    grid = chosen.grid()
    layers = Layers.of(empty_model(model, dtype=loading.dtype, dequantize=loading.dequantize)).uncompressed()
    if stream and task is not None and layers.model.config.is_encoder_decoder:
        raise ValueError(f"--task {task} has the model write, for which it is loaded: leave it out, or --stream.")
    held = _held(scores, layers, texts)
    tasks, refused = planned(layers, grid, held, by_blocks=stream)
    _check_held(held, needed(tasks))
    norms_of(layers, grid, tasks)  # which refuses one that is not read, or cannot be
    _check_output(output, overwrite, model, texts)
    for way, level, sentence in refused:
        notes.print(f"{escape(way.name)} at {escape(str(level))} cannot be made: {escape(sentence)}", highlight=False)
    metric, metric_of = (None, "") if task is None else _metric(get_task(task), data_dir, texts.batch_size)
    tokenizer = load_tokenizer(loading.tokenizer or model)
    with stage_bars() as progress:
        samples, judging = texts.read(progress), texts.read_judging()
        with one_step("loading", progress):
            loaded = _opened(model, loading, output, stream=stream)
        draws = texts.drawn(samples, tokenizer, loaded.model, progress)
        judges = texts.judges(judging, tokenizer, loaded.model)
    with _live() as (progress, told):
        done = compare(
            loaded,
            draws,
            judges,
            grid,
            output,
            statistics=held,
            metric=None if metric is None else partial(metric, tokenizer=tokenizer),
            metric_of=metric_of,
            overwrite=overwrite,
            progress=progress,
            told=told,
        )
    console.print(comparison_table(done.cells))
    for cell in done.cells:
        if cell.error:
            sentence = f"{cell.method} at {cell.level}, seed {cell.seed}, failed: {cell.error}"
            notes.print(escape(sentence), highlight=False)
    console.print(f"[bold]{escape(str(output))}[/]: report.html, compare.csv, compare.json", highlight=False)


def _opened(model: str, loading: Loading, output: Path, *, stream: bool) -> Layers:
    """Return the model's layers: loaded, or of a `Folder`."""
    if stream:
        return Layers.of(opened(model, loading, StreamConfig(None, True), output))
    return Layers.of(
        load_model(model, dtype=loading.dtype, device_map=loading.device_map, dequantize=loading.dequantize)
    )


def _held(scores: Path | None, layers: Layers, texts: Texts) -> RoutingStatistics | None:
    if scores is None:
        return None
    if texts.seeds > 1:
        raise ValueError(f"--scores {scores} is of one draw of the calibration text: leave out --seeds {texts.seeds}.")
    return read_scores(scores, layers, ())


def _check_held(held: RoutingStatistics | None, needs: Sequence[str]) -> None:
    for sums in held.layers.values() if held else ():
        sums.check(of_data(needs))


def _check_output(output: Path, overwrite: bool, model: str, texts: Texts) -> None:
    """Check that a comparison can be written, or gone on with, and keep others from it until the command ends."""
    check_apart(output, {"the model": model, "the data": texts.data, "the texts": [*texts.judging.values()]})
    if not overwrite:
        Journal.read(output)
    CLAIMS.enter_context(working_folder(Path(os.path.realpath(output.expanduser()))))


def _metric(task: Task, data_dir: Path | None, batch_size: int) -> tuple[Callable[..., Mapping[str, float]], str]:
    """Return what measures a task on a model, and the task with a hash of its rows.

    Raises:
        ValueError: there are no usable rows.
    """
    rows = task_rows(task, task.evaluation_split, data_dir=data_dir, limit=None)
    if not rows:
        raise ValueError(f"Task {task.name!r} has no rows in split {task.evaluation_split!r} here.")
    task.examples(rows)

    def measure(model: PreTrainedModel | Source, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, float]:
        by = "generation" if source_of(model).model.config.is_encoder_decoder else "likelihood"
        figures = evaluate_task(model, tokenizer, task, rows, batch_size=batch_size, by=by)
        return {f"{task.name} {name}": value for name, value in figures.items() if name != "examples"}

    rows_hash = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return measure, f"{task.name} on {len(rows)} rows ({rows_hash})"


@contextmanager
def _live() -> Iterator[tuple[Stages, Callable[[list[Cell]], None]]]:
    """Show the table of finished cells and the bars of stages for the time of the block."""
    bars = unstarted_bars()
    with Live(Group(Sheet(""), bars), console=notes, transient=True, redirect_stdout=False) as live:
        yield Stages(bars), lambda cells: live.update(Group(comparison_table(cells), bars))


def comparison_table(cells: Sequence[Cell]) -> Sheet:
    """Return a table of cells, a row for each method and level, of all draws together."""
    rows = rows_of(cells)
    texts = list(dict.fromkeys(name for row in rows for name in row.cell.texts))
    metrics = list(dict.fromkeys(name for row in rows for name in row.cell.metrics))
    sheet = Sheet("method", "level", "size", *(f"KL, {text}" for text in texts), *metrics, "seconds")
    for row in sorted(rows, key=lambda row: (row.cell.method != ORIGINAL, row.cell.level)):
        cell = row.cell
        if cell.error:
            sheet.add_row(escape(cell.method), cell.level, "failed", *("" for _ in [*texts, *metrics, ""]))
            continue
        worth = [figure(cell.texts[name].kl) for name in texts]
        others = [figure(cell.metrics.get(name)) for name in metrics]
        seconds = "" if cell.seconds is None else f"{cell.seconds:.1f}"
        sheet.add_row(escape(cell.method), cell.level, size(cell.bytes or 0), *worth, *others, seconds)
    return sheet
