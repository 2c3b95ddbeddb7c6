"""`hf-mcsmoe plan`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.dial import Dial
from hf_mcsmoe.cli.display import console, notes, stage_bars
from hf_mcsmoe.cli.options import Loading, Model, Storage, check_dtype, check_file, described, options_of
from hf_mcsmoe.cli.plan_tables import figure_lines, rung_table
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.files import write_json
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.result import Result, result_by_hand, result_of
from hf_mcsmoe.layers.dequantize import quantization_method
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_config, load_model, load_tokenizer
from hf_mcsmoe.layers.stored import Stored, configured_bytes, stored_bytes
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import check_request
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.search.choices import check_reachable, choose
from hf_mcsmoe.search.conditions import check_curves, conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of
from hf_mcsmoe.search.ladder import Rung, method_sizes, size_ladder
from hf_mcsmoe.search.size import bytes_of, bytes_text


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


@dataclass(frozen=True)
class Asked:
    """What is asked for: experts and what they are stored as by hand, or else a size."""

    config: MergeConfig
    quantization: QuantizationConfig | None
    low_rank: LoSparseConfig | None
    search: SizeConfig | None

    @classmethod
    def of(cls, dial: Dial, storage: Storage, seed: int) -> "Asked":
        """Return what options of the command line ask for."""
        merge = MergeConfig()
        low_rank = storage.low_rank() if dial.is_by_hand else None
        return cls(
            replace(dial.apply(merge), seed=seed), dial.quantization(), low_rank, dial.size_config(merge, storage)
        )

    def check(self, layers: Layers) -> None:
        """Raise ValueError where this model cannot become what is asked for."""
        check_request(layers, replace(self.config, experts=1.0) if self.search else self.config)
        if self.quantization:
            self.quantization.check_layers(layers.selected(self.config.skip))
        if self.low_rank:
            check_low_rank(layers, replace(self.low_rank, skip=self.config.skip))

    def result(self, layers: Layers, statistics: RoutingStatistics | None, source: int) -> Result | None:
        """Return the result; None for a size that nobody measured, which is shared out when text is at hand.

        Raises:
            ValueError: the size cannot be reached.
        """
        if self.search is None:
            return result_by_hand(layers, self.config, quantization=self.quantization, low_rank=self.low_rank)
        limit = bytes_of(self.search.size, source)
        check_reachable(layers, self.search, limit, self.config.skip)
        if statistics is None:
            return None
        chosen = choose(layers, statistics.curves, self.search, limit, self.config.skip)
        return result_of(layers, chosen.choices, self.config.skip)


@options_of(Dial, "dial", panel="Size")
@options_of(Storage, "storage", panel="Storage")
@options_of(Planning, "calibration", panel="Data")
@options_of(Loading, "loading", panel="Loading")
def plan_command(
    model: Model,
    dial: Dial,
    storage: Storage,
    calibration: Planning,
    loading: Loading,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="file of statistics with what choices cost: read if it is there, else written", rich_help_panel="Data"
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="write the figures to this file as well", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Show what a model is, what it would be at several sizes, and what that takes; reads its configuration alone."""
    target = None if json_file is None else check_file(json_file, "--json")
    check_dtype(loading.dtype)
    asked, search = Asked.of(dial, storage, calibration.seed), SizeConfig(reduce=dial.reduce or SizeConfig.reduce)
    search = asked.search or search
    layers = Layers.of(empty_model(model, dtype=loading.dtype, dequantize=True)).uncompressed()
    stored = _stored(model, layers, loading.dtype)
    asked.check(layers)
    statistics = _read(scores, layers) if scores else None
    if statistics:
        check_curves(layers, statistics, asked.config, search, JOINT)
    if statistics is None and calibration.data:
        with stage_bars() as progress:
            layers, statistics = _measured(model, calibration, loading, asked.config, search, progress)
        if scores:
            statistics.save(scores)
    figures = figures_of(layers)
    for line in figure_lines(layers, figures, stored):
        console.print(line, highlight=False, soft_wrap=True)
    rungs = [] if dial.is_by_hand else _rungs(layers, statistics, search, stored.bytes, asked.config.skip)
    told: dict[str, Any] = {"figures": asdict(figures), "source": asdict(stored), "sizes": list(map(_rung, rungs))}
    if dial.is_by_hand or dial.size:
        result = asked.result(layers, statistics, stored.bytes)
        told["result"] = None if result is None else {"bytes": result.bytes, "parameters": result.parameters}
        console.print(_result_line(dial, result, asked, stored), highlight=False, soft_wrap=True)
    if statistics is None and not dial.is_by_hand:
        notes.print("what a size costs is measured on text: name some with --data", highlight=False)
    if rungs:
        console.print(rung_table(rungs, stored.bytes))
    if target is not None:
        write_json(target, told)


def _stored(model: str, layers: Layers, dtype: str) -> Stored:
    """Return the bytes of a model's weight files, as they tell or as its configuration does."""
    config = load_config(model)
    if (method := quantization_method(config)) is not None:
        notes.print(f"weights are quantized ({method}): compress it with --dequantize", highlight=False)
    if (known := stored_bytes(model)) is not None:
        return known
    return configured_bytes(layers.model if dtype == "auto" else empty_model(model, dequantize=True), config)


def _rungs(
    layers: Layers, statistics: RoutingStatistics | None, search: SizeConfig, source: int, skip: Sequence[str]
) -> list[Rung]:
    if statistics is None:
        return method_sizes(layers, search, skip)
    return size_ladder(layers, statistics.curves, search, source, skip)


def _rung(rung: Rung) -> dict[str, Any]:
    return {"method": rung.method, "bytes": rung.chosen.bytes, "predicted_kl": rung.effect}


def _result_line(dial: Dial, result: Result | None, asked: Asked, stored: Stored) -> str:
    """Return the sentence that tells what the options given lead to."""
    options = {"experts": dial.experts, "size": dial.size, "bits": dial.bits, "reduce": dial.reduce}
    given = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    if result is None:
        limit = bytes_of(asked.search.size if asked.search else 1.0, stored.bytes)
        return f"with {given}: at most {bytes_text(limit)}, shared out by what is measured on text"
    return (
        f"with {given}: {bytes_text(result.bytes)} ({result.bytes / stored.bytes:.3f} of the source), parameters "
        f"{result.parameters:,}, active per token {result.active:,}"
    )


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
