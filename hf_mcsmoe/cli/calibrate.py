"""`hf-mcsmoe calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.gradients import check_loss
from hf_mcsmoe.calibration.reference import add_reference, check_reference, reference_norms
from hf_mcsmoe.calibration.scores import extended, lacking
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.display import console, notes, stage_bars
from hf_mcsmoe.cli.needs import costs, needs_of_names, usual
from hf_mcsmoe.cli.options import BaseModel, Loading, Model, check_device_map, check_dtype, check_file, options_of
from hf_mcsmoe.cli.scores import read_scores
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import opened
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import gradient_names, of_data
from hf_mcsmoe.planning import FEW_TOKENS
from hf_mcsmoe.processes import current
from hf_mcsmoe.progress import Progress, one_step
from hf_mcsmoe.search.conditions import covered
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.curves import add_curves

DATA = ["data", "column", "target_column", "split", "num_samples", "max_length", "batch_size", "seed"]
# Experts of a layer that are named one by one.
NAMED = 8


@options_of(Calibration, "calibration", DATA, panel="Data")
@options_of(Loading, "loading", panel="Loading")
def calibrate_command(
    model: Model,
    calibration: Calibration,
    loading: Loading,
    output: Annotated[
        Path, typer.Option(help="file of statistics; to one of the same data is added", rich_help_panel="Output")
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="presets, methods of any stage or statistics, with commas: what these read is summed",
            show_default="all that takes no product beyond the forward",
            rich_help_panel="Methods",
        ),
    ] = None,
    base_model: BaseModel = None,
    curves: Annotated[
        bool,
        typer.Option(help="also measure what choices for a size cost", rich_help_panel="Methods"),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(help="read block by block, one of them in memory", rich_help_panel="Loading"),
    ] = False,
    drop_source_cache: Annotated[
        bool,
        typer.Option(
            help="with --stream: remove shards of a Hub id from the cache again, once they are read",
            rich_help_panel="Loading",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="begin anew where the file is there", rich_help_panel="Output")
    ] = False,
) -> None:
    """Sum once, over calibration text, what methods read, for any number of experts: the file of `--scores`."""
    check_device_map(loading.device_map)
    check_dtype(loading.dtype)
    config, search, how = MergeConfig(seed=calibration.seed), SizeConfig(), StreamConfig(None, True, drop_source_cache)
    needs = [*(usual() if methods is None else needs_of_names(methods)), *(needs_of(config, search) if curves else ())]
    how.check_drops(model)
    check_file(output, "--output")
    layers = Layers.of(empty_model(model, dtype=loading.dtype, dequantize=loading.dequantize)).uncompressed()
    check_loss(layers.model, needs)
    if stream:
        if curves or gradient_names(needs):
            check_blocks(layers)
    elif drop_source_cache:
        raise ValueError("--drop-source-cache goes with --stream, which reads a shard at a time: give both.")
    held = read_scores(output, layers) if output.is_file() and not overwrite else None
    check_reference(needs, base_model, held)
    if base_model:
        reference_norms(layers, base_model)
    with stage_bars() as progress:
        samples, tokenizer = calibration.read(progress), load_tokenizer(loading.tokenizer or model)
        with one_step("loading", progress):
            loaded = Layers.of(opened(model, loading, how, output) if stream else _loaded(model, loading))
        # What is held out judges a later `compress`.
        batches, _ = calibration.batches(samples, tokenizer, loaded.model, progress)
        statistics = _collected(loaded, batches, held, of_data(needs), progress, output.absolute().parent)
        is_there = statistics is held and not lacking(held, needs)
        if is_there and (not curves or covered(layers, statistics, config, search, JOINT)):
            notes.print(f"{escape(str(output))} holds all of it already")
            return
        statistics = add_reference(statistics, loaded, base_model) if base_model else statistics
        _save(statistics, output)
        if curves and not covered(loaded, statistics, config, search, JOINT):
            add_curves(loaded, batches, statistics, config, search, progress, output.absolute().parent)
            _save(statistics, output)
        if isinstance(loaded.source, Folder):
            loaded.source.drop_fetched()
    _tell(statistics, output, methods)


def _save(statistics: RoutingStatistics, output: Path) -> None:
    """Write the file; of several processes the first one does."""
    if current().is_first:
        statistics.save(output)


def _loaded(model: str, loading: Loading) -> PreTrainedModel:
    return load_model(model, dtype=loading.dtype, device_map=loading.device_map, dequantize=loading.dequantize)


def _collected(
    layers: Layers,
    batches: Sequence[Batch],
    held: RoutingStatistics | None,
    needs: list[str],
    progress: Progress,
    place: Path,
) -> RoutingStatistics:
    """Return the sums; `place` is a folder on the disk of which hidden states may lie meanwhile.

    Raises:
        ValueError: those that are held are of another model or of other data.
    """
    try:
        return extended(layers, batches, held, needs, progress, place)
    except ValueError as error:
        if held is None:
            raise
        raise ValueError(f"{error} To write them in place of those in the file pass --overwrite.") from None


def _tell(statistics: RoutingStatistics, output: Path, methods: str | None) -> None:
    """Say what the file holds, what it does not, and which experts saw few tokens."""
    names = list(next(iter(statistics.layers.values())))
    more = ", and what choices cost" if statistics.curves else ""
    console.print(f"[bold]{escape(str(output))}[/] holds {', '.join(names)}{more}", highlight=False)
    if methods is None:
        for cost, others in costs(names).items():
            notes.print(f"not summed: {', '.join(others)} ({cost})", highlight=False)
        notes.print("--methods NAME,... adds what these methods read", highlight=False)
    for sentence in few_tokens(statistics):
        notes.print(sentence, highlight=False)


def few_tokens(statistics: RoutingStatistics) -> list[str]:
    """Return a sentence for each layer with experts that few tokens reached, which names these."""
    told = []
    for layer, sums in statistics.layers.items():
        counts = sums.counts.tolist() if "counts" in sums else []
        few = [f"{expert} ({count})" for expert, count in enumerate(counts) if count < FEW_TOKENS]
        if few:
            rest = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
            told.append(
                f"{layer}: few of its {int(sums.tokens):,} tokens reached experts {', '.join(few[:NAMED])}{rest}; "
                "what is said of these rests on chance"
            )
    return told
