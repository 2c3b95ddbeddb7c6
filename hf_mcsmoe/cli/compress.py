"""`hf-mcsmoe compress`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.reference import add_reference, check_reference, reference_norms
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.dial import Dial
from hf_mcsmoe.cli.display import notes, stage_bars
from hf_mcsmoe.cli.export import PlainForm
from hf_mcsmoe.cli.options import (
    BaseModel,
    Inside,
    Loading,
    Model,
    Output,
    Storage,
    check_device_map,
    check_dtype,
    check_file,
    itemsize,
    options_of,
)
from hf_mcsmoe.cli.outcome import calibrated, finish
from hf_mcsmoe.cli.plain import check_unfitted, fit_of, plain_asked, plain_config, write_plain
from hf_mcsmoe.cli.preset import MERGE, PresetName, check_preset
from hf_mcsmoe.cli.recipe import recipe_text
from hf_mcsmoe.cli.report import draw
from hf_mcsmoe.cli.scores import read_scores
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import Streaming, forget_interrupted, opened, push_folder, telling_what_is_kept
from hf_mcsmoe.compress import compress
from hf_mcsmoe.evaluation.costs import REPETITIONS
from hf_mcsmoe.export.calibrate import RouterFit
from hf_mcsmoe.export.checkpoint import kept_sentence
from hf_mcsmoe.export.sized import plain_bytes
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.options import check_options, chosen_repair, merges_nothing, sparsity_needs
from hf_mcsmoe.planning import saved_parameters
from hf_mcsmoe.processes import current
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.record import Record
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig
from hf_mcsmoe.search.compress import check_size
from hf_mcsmoe.search.conditions import check_curves
from hf_mcsmoe.search.config import JOINT
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import Saving
from hf_mcsmoe.streamed.journal import finished_bytes, is_placing


@options_of(Calibration, "calibration", panel="Data")
@options_of(Output, "target", panel="Output")
@options_of(Dial, "dial", panel="Size")
@options_of(MergeConfig, "merge", MERGE, panel="Merge")
@options_of(Storage, "storage", panel="Storage")
@options_of(Inside, "inside", panel="Storage")
@options_of(Loading, "loading", panel="Loading")
@options_of(Streaming, "streaming", panel="Streaming")
@options_of(PlainForm, "form", panel="Plain")
def compress_command(
    model: Model,
    calibration: Calibration,
    target: Output,
    dial: Dial,
    merge: MergeConfig,
    storage: Storage,
    inside: Inside,
    loading: Loading,
    streaming: Streaming,
    form: PlainForm,
    preset: PresetName = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="fit merged layers to the original ones: " + ", ".join(REPAIR),
            show_default="refit; with --size joint; none where no layer changes",
            rich_help_panel="Repair",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="file of routing statistics: read if it is there, else written", rich_help_panel="Data"),
    ] = None,
    base_model: BaseModel = None,
    plain: Annotated[
        bool,
        typer.Option(help="write an ordinary checkpoint of the family, without our code", rich_help_panel="Plain"),
    ] = False,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Make a model fit a size, guided by its routers on calibration text: fewer experts, in fewer bits."""
    check_preset(preset, is_by_hand=dial.is_by_hand)
    config, size = replace(dial.apply(merge), seed=calibration.seed), dial.size_config(merge, storage)
    config = config if size is None else replace(config, min_experts=1)  # the size's options have it
    check_device_map(loading.device_map)
    check_dtype(loading.dtype)
    streaming.config().check_drops(model)
    empty = empty_model(model, dtype=loading.dtype, dequantize=loading.dequantize)
    layers = Layers.of(empty).uncompressed()
    low_rank = None if size else storage.low_rank()  # a size has its rank among its options
    stages: dict[str, Any] = {"low_rank": low_rank, "quantization": dial.quantization(), "size": size}
    stages["sparsity"] = inside.config(dial.skip or ())
    asked = plain_asked(form, plain=plain)
    config, size = plain_config(config, size, layers, asked)
    stages["size"] = size
    stages["repair"] = _chosen(repair, layers, config, stages)
    needed, held = _check(layers, config, stages, loading.dtype, scores, base_model)
    held = streaming.given(held, target.output)
    beside = plain_bytes(layers, config, asked, stages) if asked else 0
    read = {"data": calibration.data, "check_data": calibration.check_data or [], "base_model": base_model}
    # The same in all processes, whatever each has free.
    streaming = current().agreed(partial(streaming.going_on, target.output))
    is_streamed = current().agreed(partial(streaming.is_chosen, layers, config, stages, held, calibration))
    if not is_streamed:
        streaming.tell_unused()
    check_unfitted(form if asked and is_streamed else None, config, size)
    goes_on = is_streamed and not streaming.restart
    claims = replace(target, overwrite=True) if goes_on and is_placing(target.output) else target
    done = finished_bytes(target.output) if goes_on else 0
    # Of a size two results lie on disk until one of them is taken.
    written = (2 if size else 1) * needed + beside if is_streamed else beside or needed
    output = claims.claimed(max(0, written - done), model=model, **read)
    tokenizer = load_tokenizer(loading.tokenizer or model)
    reads = held is None or config.budget == MEASURED or any(stages.values())
    started = time.perf_counter()
    with stage_bars() as progress:
        samples, other = calibration.read(progress) if reads else [], calibration.read_check()
        with one_step("loading", progress):
            folder = opened(model, loading, streaming.config(), output) if is_streamed else None
            loaded = folder.model if folder else load_model(model, **_how(loading))
        batches, held_out = calibration.batches(samples, tokenizer, loaded, progress) if reads else ([], [])
        check = calibration.check_batches(other, tokenizer, loaded)
        told = calibrated(calibration, batches, held_out, check)
        used = {"repair": stages["repair"].method if stages["repair"] else "none"}
        used |= {"size": str(size.size)} if size else {}
        used |= {} if held is not None else {"scores": None}  # which others can take anew
        text = recipe_text("compress", {**(recipe or {}), **used})
        own = tokenizer if loading.tokenizer else None
        sums = held
        if held is not None:
            unused = "" if batches else "; --data is not used" + ("" if check else ", and nothing is measured")
            notes.print(f"statistics read from {escape(str(scores))}{unused}")
        elif scores and not folder:
            needs = of_data(_needs(layers, config, stages))
            sums = collect_statistics(loaded, counted(batches, "statistics", progress), needs)
        if sums is not None and base_model and not folder:
            sums = add_reference(sums, Layers.of(loaded), base_model)
        if sums is not None and scores and (held is None or base_model) and current().is_first and not folder:
            sums.save(scores)
        # It is compared with to the end.
        original = plain or any(stages[name] for name in ("repair", "quantization", "size"))
        shown: dict[str, Any] = {"progress": progress, "repetitions": REPETITIONS, "held_out": held_out}
        shown["check"] = check
        if folder:
            told_of = partial(replace, calibration=told, recipe=text)
            saving = Saving(own, told_of, lambda folder: draw(folder) if asked is None else None, scores, asked)
            with telling_what_is_kept(output):
                record = compress_folder(
                    folder,
                    output,
                    batches,
                    config,
                    **stages,
                    statistics=held,
                    base_model=base_model,
                    progress=progress,
                    held_out=held_out,
                    check=check,
                    stream=streaming.config(),
                    saving=saving,
                )
            if current().is_first:
                finish(record, output, started)
                push_folder(target, output)
            return
        merged = compress(
            loaded,
            batches,
            config,
            **stages,
            consume=not original,
            statistics=sums,
            base_model=None if sums else base_model,
            **shown,
        )
    if not current().is_first:
        return
    if size and scores and sums is not None:
        sums.save(scores)  # with what choices cost, which was measured meanwhile
    attach_record(merged, replace(record_of(merged), calibration=told, recipe=text))
    fit = fit_of(batches, held_out, check, loaded, form.router_steps, record_of(merged)) if plain else None
    with stage_bars() as progress:
        record = _saved(merged, output, own, (form, fit) if plain else None, progress)
    forget_interrupted(output)
    finish(record, output, started)
    _push(target, merged, output, None if plain else own, plain=plain)


def _push(
    target: Output, merged: PreTrainedModel, output: Path, tokenizer: PreTrainedTokenizerBase | None, *, plain: bool
) -> None:
    if plain:
        push_folder(target, output)
    else:
        target.push(merged, tokenizer)


def _saved(
    merged: PreTrainedModel,
    output: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    plain: tuple[PlainForm, RouterFit | None] | None,
    progress: Progress,
) -> Record:
    """Save the result, as a plain checkpoint where `plain` says how; returns its record.

    Raises:
        ValueError: it has none after all: then it is saved in our own format.
    """
    lost = None
    if plain is not None:
        try:
            return write_plain(merged, output, *plain, tokenizer, progress)
        except ValueError as error:
            lost = error
    with one_step("saving", progress):
        cast(Any, merged).save_pretrained(output, tokenizer=tokenizer)
        draw(output)
    if lost is not None:
        raise ValueError(kept_sentence(output, lost)) from lost
    return record_of(merged)


def _how(loading: Loading) -> dict[str, Any]:
    return {"dtype": loading.dtype, "device_map": loading.device_map, "dequantize": loading.dequantize}


def _chosen(repair: str | None, layers: Layers, config: MergeConfig, stages: Mapping[str, Any]) -> RepairConfig | None:
    """Return the repair that is asked for, or else the default where there is something to repair."""
    if repair is not None:
        asked = RepairConfig(method=repair)
        return asked if stages["size"] else chosen_repair(asked)
    if stages["size"]:
        return JOINT
    sparsity = stages["sparsity"]
    narrows = sparsity is not None and sparsity.is_units
    if not (stages["quantization"] or narrows) and merges_nothing(layers, config):
        notes.print("every layer keeps all its experts, so there is nothing to repair")
        return None
    return RepairConfig()


def _check(
    layers: Layers,
    config: MergeConfig,
    stages: dict[str, Any],
    dtype: str,
    scores: Path | None,
    base_model: str | None,
) -> tuple[int, RoutingStatistics | None]:
    """Check all that can be checked before weights are loaded; returns the bytes to write and what a file holds."""
    check_options(layers, config, **stages)
    needs = _needs(layers, config, stages)
    held = _read(scores, layers, of_data(needs) if base_model else needs) if scores else None
    check_reference(needs, base_model, held)
    if base_model:
        reference_norms(layers, base_model)
    if stages["size"]:
        if held:
            check_curves(layers, held, config, stages["size"], stages["repair"])
        return check_size(layers, config, stages["size"]), held
    parameters = layers.model.num_parameters() - saved_parameters(layers, config)
    return parameters * itemsize(dtype, layers.model), held


def _needs(layers: Layers, config: MergeConfig, stages: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the statistics that the merge, or what may be chosen for a size, and zeros inside experts read."""
    if stages["size"]:
        return needs_of(config, stages["size"])
    return (*config.needs, *sparsity_needs(layers, config, stages["sparsity"]))


def _read(file: Path, layers: Layers, needs: Sequence[str]) -> RoutingStatistics | None:
    """Return the statistics that a file holds; None where there is none yet.

    Raises:
        ValueError: it can be neither read nor written, is damaged, of other layers, or lacks a sum.
    """
    if not file.is_file():
        check_file(file, "--scores")
        return None
    return read_scores(file, layers, needs)
