"""The story of a plain checkpoint: what becomes of the experts, of the router's rows, and what is written."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import record_of
from hf_mcsmoe.card import planned_layers, render, renew_metadata
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.export.architectures import check_architecture
from hf_mcsmoe.export.calibrate import Fitted, RouterFit, fit_router
from hf_mcsmoe.export.engines import check_engine_names, check_engines
from hf_mcsmoe.export.form import PlainForm, check_family, plain_form_of, shape_of
from hf_mcsmoe.export.router_rows import bias_name, check_router_rows, group_bias, row_weights
from hf_mcsmoe.export.stored import Stored, stored_form
from hf_mcsmoe.export.substituted import ENGINE, is_substituted, substituted_form
from hf_mcsmoe.export.write import State, router_tensors, write_weights
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.layers.output import check_output
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.modeling.companions_mcsmoe import copy_companions
from hf_mcsmoe.modeling.companions_mcsmoe import source_of as folder_of
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder
from hf_mcsmoe.modeling.saving_mcsmoe import CARD_FILE, write_documents
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.record import Record, Step
from hf_mcsmoe.record import Stored as Layer

# The titles of the steps that make an ordinary checkpoint, and one of vLLM's own format.
PLAIN, SUBSTITUTED = "Plain checkpoint", "Checkpoint for vLLM"
# What the figures of such a step call the divergence from the merged model, on held-out rows and on other text.
KL_TO_MERGED, CHECK_KL_TO_MERGED = "kl_to_merged", "check_kl_to_merged"


def export(
    model_or_folder: PreTrainedModel | str | os.PathLike | Source,
    output: str | os.PathLike,
    *,
    engines: Sequence[str] = (),
    router_rows: str = "frequency",
    expand: bool = False,
    dense: bool = False,
    mxfp4: bool = False,
    overwrite: bool = False,
    fit: RouterFit | None = None,
    progress: Progress | None = None,
) -> Record:
    """Write a compressed model as an ordinary checkpoint of its family, which needs no code of ours.

    It has the family's own class, configuration and names, fewer experts, and a router with a row for each of them.
    A folder is read block by block.

    Args:
        model_or_folder: a compressed model, or the folder of one.
        output: the folder to be written; it is complete or not there.
        engines: those that must be able to run it.
        router_rows: what the rows of a group's experts become: their mean by `frequency`, that of the `dominant` one,
            their `mean`, or with `logsumexp` that and log n in the router's bias, where the family has one.
        expand: put every stored expert into all the places of those that it stands for: the same logits, full size.
        dense: multiply low rank + sparse experts out, and write those in few bits as the weights they stand for.
            Without, these stay in few bits, as compressed-tensors stores them.
        mxfp4: store the experts of gpt-oss in MXFP4, as its own checkpoints do.
        overwrite: whether files in `output` may be replaced.
        fit: what the router is fitted to; the model is then loaded whole. None leaves its rows as they were combined.
        progress: told of each stage; see `Progress`.

    Returns:
        The record that was saved.

    Raises:
        ValueError: see `plain_form_of` and `stored_form`; rows that the plan does not tell, an engine that cannot run
            the result, an output in use.
    """
    check_router_rows(router_rows)
    source, stores = source_of(model_or_folder), {"expand": expand, "dense": dense, "mxfp4": mxfp4}
    form, stored, advice = checked(source, engines, **stores, is_fitted=fit is not None)
    folder = folder_of(source.model)
    apart = {} if folder is None else {"the model": folder}
    target = check_output(output, overwrite=overwrite, needed_bytes=stored.bytes, apart=apart)
    if fit is not None and isinstance(source, Folder):  # it runs many times
        source = source_of(load_model(str(source.model.name_or_path)))
        form, stored, _ = checked(source, engines, **stores, is_fitted=True)
    before = record_of(source.model)
    record = stored.told(before)
    rows = plain_routers(form, router_rows, record.plan)
    fitted = None if fit is None else fit_router(form, rows, fit, stored.loaded, progress)
    rows = rows if fitted is None else fitted.rows
    told = [*advice, *([] if fit is None or fitted is None else fit_lines(fit, fitted))]
    options = {"experts": form.num_experts, "expand": expand} | ({} if expand else {"router_rows": router_rows})
    record = _told(form, stored, record, told, options)
    if fit is not None and fitted is not None:
        record = _judged(record, fit, fitted)
    record = replace(record, card=render(record))
    with completed_folder(Path(os.path.realpath(target))) as made:
        if form.plain.can_generate():
            form.plain.generation_config = source.model.generation_config
        vars(form.plain.config).update(stored.config)
        form.plain.save_pretrained(made, state_dict={})
        write_weights(form, made, rows, stored.experts)
        if folder is not None:
            copy_companions(folder, made)
        write_documents(record, folder, made, target.name)
        renew_metadata(made / CARD_FILE, before, record, target.name)
    return record


def checked(
    source: Source, engines: Sequence[str], *, expand: bool, dense: bool, mxfp4: bool, is_fitted: bool
) -> tuple[PlainForm, Stored, list[str]]:
    """Return what becomes of a compressed model, and what engines advise otherwise; found without weights.

    Raises:
        ValueError: see `export`.
    """
    check_engine_names(engines)
    layers = Layers.of(source)
    check_family(layers)
    if is_substituted(layers, engines):
        if expand or is_fitted:
            what = "expand (--expand)" if expand else "data"
            raise ValueError(f"The routers of pruned layers with constants keep all of their rows: leave {what} out.")
        form = substituted_form(layers)
    else:
        form = plain_form_of(layers, expand=expand, engines=engines)
    advice = check_architecture(engines, type(form.plain).__name__, form.plain.config.model_type)
    advice += check_engines(engines, shape_of(layers, form.num_experts))
    stored = stored_form(form, engines, dense=dense, mxfp4=mxfp4)
    if is_fitted and not any(slot.is_combined for slot in form.slots):
        raise ValueError("The plain router keeps all of its rows, so that there is nothing to fit: leave data out.")
    return form, stored, advice


def kept_sentence(folder: Path, error: Exception) -> str:
    """Return what is told where a result has turned out to have no plain form, and is saved in our own format."""
    return f"{error} So the result is no plain checkpoint: it lies in {folder} in our own format."


def plain_routers(form: PlainForm, router_rows: str, plan: dict[str, Any]) -> dict[str, State]:
    """Return the tensors of the plain routers, by the plan of the merge as JSON values; see `router_tensors`.

    Raises:
        ValueError: the plan does not say by what rows are weighted, or the family has no place for them.
    """
    planned = plan.get("layers", {})
    biases = [bias_name(slot.plain) for slot in form.slots] if router_rows == "logsumexp" else []
    weights = {
        slot.layer.name: row_weights(slot, router_rows, planned.get(slot.layer.original_name, {}))
        for slot in form.slots
    }
    rows = router_tensors(form, weights)
    for slot, name in zip(form.slots, biases, strict=False):
        if slot.is_combined:
            bias = rows[slot.layer.name][name]
            rows[slot.layer.name][name] = (bias.double() + group_bias(slot).to(bias.device)).to(bias.dtype)
    return rows


def _told(form: PlainForm, stored: Stored, record: Record, told: list[str], options: dict[str, Any]) -> Record:
    """Return the record of the plain model, but for its card and what was measured of it."""
    kind, count, expand = type(form.plain).__name__, form.num_experts, options["expand"]
    constants = any(slot.layer.num_constants for slot in form.slots)
    if constants:
        line = f"`{kind}` in the format of vLLM, whose routers know {count} experts a layer."
    elif expand:
        line = f"`{kind}` with {count} experts a layer as before: each merged expert stands in all of its places."
    else:
        line = f"`{kind}` with {count} experts a layer."
    if any(slot.is_combined for slot in form.slots):
        line += f" Each group of merged experts has one row in the router (`{options['router_rows']}`)."
    step = Step(SUBSTITUTED if constants else PLAIN, options, [line, *told])
    engine = ENGINE if constants else ""
    record = replace(record.with_step(step), is_plain=True, layers=_layers(form, stored, record), engine=engine)
    if constants or not record.costs:  # which hold less than the family's own model would
        return record
    with torch.device("meta"):
        return replace(record, costs=record.costs | {"plain": account(form.plain)})


def _layers(form: PlainForm, stored: Stored, record: Record) -> dict[str, Layer]:
    """Return what became of each layer, as it is stored now."""
    layers = dict(record.layers or planned_layers(record.plan))
    for slot in form.slots:
        name, key = slot.layer.name, slot.layer.original_name
        if key in layers:
            after = len(set(slot.stored)) if not slot.layer.num_constants else layers[key].after
            bits = stored.bits.get(name, {})
            layers[key] = replace(layers[key], after=after, rank={}, bits=bits, bytes=stored.layers[name])
    return layers


def _judged(record: Record, fit: RouterFit, fitted: Fitted) -> Record:
    """Return the record with what was measured of a router; against the original, in place of earlier figures."""
    *steps, step = record.steps
    figures: dict[str, Any] = {"router": fitted.taken, KL_TO_MERGED: fitted.to_merged}
    if fitted.check_to_merged:
        figures[CHECK_KL_TO_MERGED] = fitted.check_to_merged
    record = replace(record, steps=(*steps, replace(step, figures=figures)))
    if not fitted.quality:
        return record
    others = {stage: value for stage, value in fitted.quality.items() if stage != fitted.taken}
    record = record.with_quality({**others, fitted.taken: fitted.quality[fitted.taken]})
    return replace(record, judged_on=None if fit.data == record.calibration else fit.data)


def fit_lines(fit: RouterFit, fitted: Fitted) -> list[str]:
    """Return what a router was fitted to and how it does, a sentence each."""
    data, teacher = fit.data, "the merged model" if fit.original is None else "the original"
    names = ", ".join(f"`{name}`" for name in data.data)
    lines = [
        f"The router was fitted to {teacher} on {data.rows - data.held_out:,} rows{' of ' if names else ''}{names}.",
        f"KL to the merged model on {data.held_out:,} held-out rows, in nats per position: "
        f"{_figures(fitted.to_merged)}.",
    ]
    if fitted.check_to_merged:
        lines.append(f"The same on text of another kind: {_figures(fitted.check_to_merged)}.")
    taken = f"The router that did best on the held-out rows was taken: {fitted.taken}."
    return [*lines, f"{taken} They chose it, so its figures there are a little better than on rows that did not."]


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {value:.4f}" for stage, value in values.items())
