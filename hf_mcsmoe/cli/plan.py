"""`hf-mcsmoe plan`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.display import Sheet, console, notes, stage_bars
from hf_mcsmoe.cli.options import Loading, Model, check_dtype, check_file, described, options_of
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.methods.config import MergeConfig, option_help
from hf_mcsmoe.plan import check_request
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.search.compress import source_bytes
from hf_mcsmoe.search.conditions import check_curves, conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of
from hf_mcsmoe.search.ladder import Rung, method_sizes, size_ladder
from hf_mcsmoe.search.size import bytes_text


@dataclass(frozen=True)
class Planning(Calibration):
    """The text that choices are measured on; without any, only sizes are told."""

    data: list[str] | None = described(  # type: ignore[assignment]
        None, "calibration text that choices are measured on; without it and --scores only sizes are told"
    )

    def __post_init__(self) -> None:
        """Take no data as none; see `Calibration`."""
        object.__setattr__(self, "data", list(self.data or []))
        super().__post_init__()


@options_of(Planning, "calibration", panel="Data")
@options_of(Loading, "loading", panel="Loading")
def plan_command(
    model: Model,
    calibration: Planning,
    loading: Loading,
    skip: Annotated[list[str] | None, typer.Option(help=option_help("skip"), rich_help_panel="Size")] = None,
    reduce: Annotated[
        str, typer.Option(help=option_help("reduce", SizeConfig), rich_help_panel="Size")
    ] = SizeConfig.reduce,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="file of statistics with what choices cost: read if it is there, else written", rich_help_panel="Data"
        ),
    ] = None,
) -> None:
    """Show what a model would be at several sizes, and what each would cost, before anything is written."""
    search, config = SizeConfig(reduce=reduce), MergeConfig(skip=tuple(skip or ()), seed=calibration.seed)
    check_dtype(loading.dtype)
    layers = Layers.of(empty_model(model, dtype=loading.dtype, dequantize=loading.dequantize)).uncompressed()
    check_request(layers, replace(config, experts=1.0))
    statistics = _read(scores, layers) if scores else None
    if statistics:
        check_curves(layers, statistics, config, search, JOINT)
    if statistics is None and calibration.data:
        with stage_bars() as progress:
            layers, statistics = _measured(model, calibration, loading, config, search, progress)
        if scores:
            statistics.save(scores)
    source = source_bytes(layers)
    console.print(f"the weight files take {bytes_text(source)}", highlight=False)
    if statistics is None:
        notes.print("what a size costs is measured on text: name some with --data", highlight=False)
        console.print(rung_table(method_sizes(layers, search, config.skip), source))
        return
    console.print(rung_table(size_ladder(layers, statistics.curves, search, source, config.skip), source))


def _read(file: Path, layers: Layers) -> RoutingStatistics | None:
    """Return statistics with curves; None where there is no file yet.

    Raises:
        ValueError: it is damaged, of another model, or tells nothing of choices.
    """
    if not file.is_file():
        check_file(file, "--scores")
        return None
    statistics = RoutingStatistics.load(file)
    statistics.check({layer.name: layer.sizes for layer in layers})
    if statistics.layers.keys() != set(layers.names):
        raise ValueError(f"--scores {file} was taken from another model, of other layers.")
    if not statistics.curves:
        raise ValueError(
            f"--scores {file} holds routing statistics, and not what choices cost: name another file and --data, and "
            "it is measured."
        )
    return statistics


def _measured(
    model: str, calibration: Planning, loading: Loading, config: MergeConfig, search: SizeConfig, progress: Progress
) -> tuple[Layers, RoutingStatistics]:
    """Load the model, and measure what choices cost on the calibration text."""
    tokenizer = load_tokenizer(loading.tokenizer or model)
    samples = calibration.read(progress)
    with one_step("loading", progress):
        loaded = load_model(model, dtype=loading.dtype, device_map=loading.device_map, dequantize=loading.dequantize)
    rows, _ = calibration.batches(samples, tokenizer, loaded, progress)  # what is held out judges a later `compress`
    layers = Layers.of(loaded)
    statistics = collect_statistics(layers, counted(rows, "statistics", progress), needs_of(config, search))

    def tell(name: str, done: int, total: int) -> None:
        progress("curves", done, total)

    statistics.curves = measure_curves(layers, statistics, rows, config, search, progress=tell)
    statistics.conditions = conditions(config, search, JOINT)
    return layers, statistics


def rung_table(rungs: list[Rung], source: int) -> Sheet:
    """Return a table of sizes: experts, ranks and bits from the least to the most, and predicted effects."""
    sheet = Sheet("method", "size", "of the source", "experts", "rank", "bits", "predicted KL")
    for rung in rungs:
        choices = rung.chosen.choices.values()
        ranks = [choice.rank for choice in choices if choice.rank]
        bits = [grid.bits if grid else None for choice in choices for grid in (choice.w_in, choice.w_out)]
        sheet.add_row(
            escape(rung.method),
            bytes_text(rung.chosen.bytes),
            f"{rung.chosen.bytes / source:.3f}",
            _span([choice.experts for choice in choices]),
            _span(ranks) + (" or full" if 0 < len(ranks) < len(choices) else ""),
            _span([number for number in bits if number]) + (" or all" if None in bits and any(bits) else ""),
            "" if rung.effect is None else f"{rung.effect:.4g}",
        )
    return sheet


def _span(values: list[int]) -> str:
    least, most = (min(values), max(values)) if values else (None, None)
    return "" if least is None else str(least) if least == most else f"{least} to {most}"
