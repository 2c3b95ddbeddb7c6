"""`hf-mcsmoe evaluate`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.cli.display import Advance, Sheet, console, stage_bars
from hf_mcsmoe.cli.options import LAST_SEED, DeviceMap, Tokenizer, check_device_map, check_file, itemsize, options_of
from hf_mcsmoe.cli.sources import Contents, Source
from hf_mcsmoe.data.choices import CHOICES
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.data.tasks import Task
from hf_mcsmoe.data.text import check_token_ids
from hf_mcsmoe.evaluation.costs import folder_bytes
from hf_mcsmoe.evaluation.harness import harness_figures, harness_tasks
from hf_mcsmoe.evaluation.quality import check_labels, check_way, multiple_choice, perplexity, predict, score
from hf_mcsmoe.files import write_json
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.progress import counted, one_step

Figures = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """A model that was checked, and what is to be measured once it is loaded."""

    model: str
    measure: Callable[[PreTrainedModel, Advance], Figures]


@options_of(Source, "source", panel="Data")
def evaluate_command(
    models: Annotated[list[str], typer.Argument(help="folders or Hub ids of models", metavar="MODEL...")],
    source: Source,
    by: Annotated[
        str | None,
        typer.Option(
            help="how to evaluate a task: generation (default with an encoder) or likelihood (without)",
            rich_help_panel="Data",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="tasks of lm-eval by name, or files (yaml), in place of --task or --data",
            rich_help_panel="Data",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="rows per forward", min=1, rich_help_panel="Data")] = 32,
    seed: Annotated[
        int,
        typer.Option(
            help="seed of the spans that are masked, for encoder-decoders on text",
            min=0,
            max=LAST_SEED,
            rich_help_panel="Data",
        ),
    ] = 0,
    tokenizer: Tokenizer = None,
    dtype: Annotated[
        str, typer.Option(help="dtype to load in: auto, float32, bfloat16 ...", rich_help_panel="Loading")
    ] = "auto",
    device_map: DeviceMap = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="write the figures to this file as well", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Evaluate models, compressed or not, on a task or on text, and compare them in one table."""
    if json_file is not None:
        json_file = check_file(json_file, "--json")
    check_device_map(device_map)
    if by is not None and source.data:
        raise ValueError("--by goes with --task; on --data it is the loss that is measured.")
    names = list(dict.fromkeys(models))
    if lm_eval is not None:
        if source != Source() or by:
            raise ValueError(
                "--lm-eval brings its own rows and ways: leave out --task, --data, what goes with them and --by."
            )
        tasks, manager = harness_tasks(lm_eval.split(","))
        measure = partial(_harness, names=tasks, manager=manager, batch_size=batch_size)
        plans = [_harness_plan(model, tokenizer, measure, dtype) for model in names]
    else:
        with stage_bars() as progress:
            contents = source.read(training=False, progress=progress)
            told = counted(names, "tokenising", progress)
            plans = [_plan(model, tokenizer, contents, by, batch_size, seed, dtype) for model in told]
    found: dict[str, Figures] = {}
    for plan in plans:
        with stage_bars() as progress:
            with one_step("loading", progress):
                model = load_model(plan.model, dtype=dtype, device_map=device_map)
            figures = plan.measure(model, progress.bar(Path(plan.model).name))
        size = folder_bytes(plan.model)
        figures |= {"parameters": model.num_parameters()} | ({} if size is None else {"bytes_on_disk": size})
        found[plan.model] = figures
        del model  # before the next is loaded
        if json_file is not None:  # after each model: a run that is killed keeps what it has
            write_json(json_file, found)
    console.print(figure_table(found))


def _checked(name: str, tokenizer_name: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model without weights and its tokenizer.

    Raises:
        ValueError: no such model or tokenizer, or one that writes no text.
    """
    empty = empty_model(name)
    if not type(empty).can_generate():
        raise ValueError(f"{name} is a {type(empty).__name__}, which writes no text; only models that do can be used.")
    itemsize(dtype, empty)
    return empty, load_tokenizer(tokenizer_name or name)


def _harness_plan(name: str, tokenizer_name: str | None, measure: Callable[..., Figures], dtype: str) -> Evaluation:
    """Check a model that tasks of lm-eval are asked of."""
    _, tokenizer = _checked(name, tokenizer_name, dtype)
    return Evaluation(name, partial(measure, tokenizer=tokenizer))


def _harness(model: PreTrainedModel, advance: Advance, **options: Any) -> Figures:
    return harness_figures(model, **options)


def _plan(
    name: str, tokenizer_name: str | None, contents: Contents, by: str | None, batch_size: int, seed: int, dtype: str
) -> Evaluation:
    """Check a model, its tokenizer and what is asked of them, without loading weights.

    Raises:
        ValueError: no such model or tokenizer, one that writes no text, or a task that it cannot be evaluated on.
    """
    empty, tokenizer = _checked(name, tokenizer_name, dtype)
    task, with_encoder = contents.task, empty.config.is_encoder_decoder
    if task is None or not with_encoder:
        features = contents.features(tokenizer, empty.config, seed=seed)
        check_token_ids(max(max(feature["input_ids"]) for feature in features), empty)
    if task is None:
        return Evaluation(name, partial(_loss, batches=feature_batches(features, tokenizer, batch_size)))
    by = by or ("generation" if with_encoder else "likelihood")
    check_way(by, task, encoder_decoder=with_encoder)
    options: dict[str, Any] = {"tokenizer": tokenizer, "contents": contents, "batch_size": batch_size}
    if task.name in CHOICES and not with_encoder:
        return Evaluation(name, partial(_choose, make=CHOICES[task.name], **options))
    check_labels(tokenizer, task)
    return Evaluation(name, partial(_answer, task=task, by=by, **options))


def _loss(model: PreTrainedModel, advance: Advance, batches: list[Any]) -> Figures:
    value = perplexity(model, advance(batches))
    return {"loss": math.log(value), "perplexity": value}


def _choose(
    model: PreTrainedModel,
    advance: Advance,
    make: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    contents: Contents,
    batch_size: int,
) -> Figures:
    rows = [make(row) for row in contents.rows]
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": contents.max_length}
    return multiple_choice(model, tokenizer, rows, progress=advance.show, **options)


def _answer(
    model: PreTrainedModel,
    advance: Advance,
    task: Task,
    by: str,
    tokenizer: PreTrainedTokenizerBase,
    contents: Contents,
    batch_size: int,
) -> Figures:
    examples = task.examples(contents.rows)
    options: dict[str, Any] = {"batch_size": batch_size, "by": by, "max_source_length": contents.max_length}
    return score(task, predict(model, tokenizer, task, examples, progress=advance.show, **options), examples)


def figure_table(found: dict[str, Figures]) -> Table:
    """Return the figures of models, a row each; what one lacks stays empty.

    Folders go by their last name where that tells them apart.
    """
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    table = Sheet("", *(name.replace("_", " ") for name in names))
    unique = len({Path(model).name for model in found}) == len(found)
    labels = [Path(model).name if unique and Path(model).is_dir() else model for model in found]
    for label, figures in zip(labels, found.values(), strict=True):
        table.add_row(escape(label), *(_shown(figures.get(name)) for name in names))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
