"""`hf-mcsmoe plan`."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.dial import DEFAULT_SIZE, Dial
from hf_mcsmoe.cli.display import console, notes, stage_bars
from hf_mcsmoe.cli.options import Inside, Loading, Model, Storage, check_dtype, check_file, options_of
from hf_mcsmoe.cli.plan_measured import Measuring, Planning, measured, read_curves
from hf_mcsmoe.cli.plan_run import Asked, Estimate, told_of_run
from hf_mcsmoe.cli.plan_tables import figure_lines, rung_table, safe_line, safe_rung
from hf_mcsmoe.cli.preset import MERGE, PresetName, check_preset
from hf_mcsmoe.cli.way import measuring_run
from hf_mcsmoe.files import write_json
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.result import Result, predicted_effect
from hf_mcsmoe.layers.dequantize import quantization_method
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_config
from hf_mcsmoe.layers.stored import Stored, configured_bytes, stored_bytes
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.search.conditions import check_curves
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.ladder import Rung, method_sizes, size_ladder
from hf_mcsmoe.search.size import bytes_of, bytes_text


@options_of(Dial, "dial", panel="Size")
@options_of(MergeConfig, "merge", MERGE, panel="Merge")
@options_of(Storage, "storage", panel="Storage")
@options_of(Inside, "inside", panel="Storage")
@options_of(Estimate, "estimate", panel="Run")
@options_of(Planning, "calibration", panel="Data")
@options_of(Loading, "loading", panel="Loading")
@options_of(Measuring, "measuring", panel="Loading")
def plan_command(
    model: Model,
    dial: Dial,
    merge: MergeConfig,
    storage: Storage,
    inside: Inside,
    estimate: Estimate,
    calibration: Planning,
    loading: Loading,
    measuring: Measuring,
    preset: PresetName = None,
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
    check_preset(preset, is_by_hand=dial.is_by_hand)
    asked = Asked.of(dial, merge, storage, inside, calibration.seed)
    search = asked.search or SizeConfig(reduce=dial.reduce or SizeConfig.reduce)
    layers = Layers.of(empty_model(model, dtype=loading.dtype, dequantize=True)).uncompressed()
    stored = _stored(model, layers, loading.dtype)
    asked.check(layers)
    statistics = read_curves(scores, layers) if scores else None
    if statistics:
        _check_curves(layers, statistics, asked, search)
    is_measured = statistics is None and bool(calibration.data)
    measuring.check(model, layers, has_text=bool(calibration.data))
    if is_measured:
        run = measuring_run(layers, asked.config, search, calibration)
        stream = measuring.config if measuring.is_chosen(layers, run, stored.bytes) else None
        with stage_bars() as progress:
            layers, statistics = measured(model, calibration, loading, stream, asked.config, search, progress)
        if scores:
            statistics.save(scores)
    figures = figures_of(layers)
    for line in figure_lines(layers, figures, stored):
        console.print(line, highlight=False, soft_wrap=True)
    rungs = [] if dial.is_by_hand else _rungs(layers, statistics, search, stored.bytes, asked.config.skip)
    told: dict[str, Any] = {"figures": asdict(figures), "source": asdict(stored), "sizes": list(map(_rung, rungs))}
    if statistics is None and not dial.is_by_hand:
        notes.print("what a size costs is measured on text: name some with --data", highlight=False)
    if rungs:
        console.print(rung_table(rungs, stored.bytes))
    if statistics is not None and (safe := safe_rung(rungs)) is not None:
        told["safe"] = _rung(safe)
        console.print(safe_line(safe), highlight=False, soft_wrap=True)
    # A default size that this model has no use for, which one that was asked for would be refused for.
    is_asked = dial.is_by_hand or dial.size is not None
    with contextlib.nullcontext() if is_asked else contextlib.suppress(ValueError):
        result = asked.result(layers, statistics, stored.bytes)
        is_predicted = statistics is not None and asked.sparsity is None
        effect = predicted_effect(statistics.curves, result) if result and statistics and is_predicted else None
        if statistics is not None and not is_predicted:
            notes.print("what --sparsify costs is not measured, so that no KL is predicted", highlight=False)
        told["result"] = None if result is None else _told(result, effect)
        console.print(_result_line(dial, result, effect, asked, stored), highlight=False, soft_wrap=True)
        told |= told_of_run(
            model, layers, asked, result, stored, calibration, estimate, statistics if scores else None
        )
    if target is not None:
        write_json(target, told)


def _check_curves(layers: Layers, statistics: RoutingStatistics, asked: Asked, search: SizeConfig) -> None:
    """Check what choices cost by a file; without it, what is said by hand has no KL.

    Raises:
        ValueError: it was measured otherwise than it is asked for, or not at all and a size is to be chosen.
    """
    if statistics.curves:
        check_curves(layers, statistics, asked.config, search, JOINT)
        return
    if asked.search:
        raise ValueError(
            "--scores holds routing statistics, and not what choices cost: name another file and --data, and it is "
            "measured."
        )
    notes.print("--scores does not hold what choices cost, so that no KL is predicted", highlight=False)


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


def _told(result: Result, effect: float | None) -> dict[str, Any]:
    told = {"bytes": result.bytes, "parameters": result.parameters, "active": result.active}
    return told | {"predicted_kl": effect}


def _result_line(dial: Dial, result: Result | None, effect: float | None, asked: Asked, stored: Stored) -> str:
    """Return the sentence that tells what the options given lead to."""
    size = None if dial.is_by_hand else dial.size or DEFAULT_SIZE
    options = {"experts": dial.experts, "size": size, "bits": dial.bits, "reduce": dial.reduce}
    options["sparsify"] = str(asked.sparsity.score) if asked.sparsity else None
    given = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    if result is None:
        limit = bytes_of(asked.search.size if asked.search else 1.0, stored.bytes)
        return f"with {given}: at most {bytes_text(limit)}, shared out by what is measured on text"
    return (
        f"with {given}: {bytes_text(result.bytes)} ({result.bytes / stored.bytes:.3f} of the source), parameters "
        f"{result.parameters:,}, active per token {result.active:,}" + ("" if effect is None else f", KL {effect:.4g}")
    )
