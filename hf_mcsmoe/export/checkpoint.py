"""The story of a plain checkpoint: what becomes of the experts, of the router's rows, and what is written."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import record_of
from hf_mcsmoe.card import render
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.export.calibrate import MERGED, Fitted, RouterFit, fit_router
from hf_mcsmoe.export.engines import check_engine_names, check_engines
from hf_mcsmoe.export.form import PlainForm, plain_form_of, shape_of
from hf_mcsmoe.export.router_rows import bias_name, check_router_rows, group_bias, row_weights
from hf_mcsmoe.export.stored import stored_form
from hf_mcsmoe.export.substituted import is_substituted, substituted_form
from hf_mcsmoe.export.write import State, router_tensors, write_weights
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.layers.output import check_output
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.modeling.companions_mcsmoe import copy_companions
from hf_mcsmoe.modeling.companions_mcsmoe import source_of as folder_of
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder
from hf_mcsmoe.modeling.saving_mcsmoe import write_documents
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.record import Quality, Record, Step

# The title of the step that makes an ordinary checkpoint.
PLAIN = "Plain checkpoint"


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
    check_engine_names(engines)
    is_loaded = fit is not None and isinstance(model_or_folder, str | os.PathLike)
    source = source_of(load_model(str(model_or_folder)) if is_loaded else model_or_folder)
    layers = Layers.of(source)
    constants = is_substituted(layers, engines)
    form = substituted_form(layers) if constants else plain_form_of(layers, expand=expand)
    advice = check_engines(engines, shape_of(layers, form.num_experts))
    stored = stored_form(form, engines, dense=dense, mxfp4=mxfp4)
    if fit is not None and not any(slot.is_combined for slot in form.slots):
        raise ValueError("The plain router keeps all of its rows, so that there is nothing to fit: leave data out.")
    folder = folder_of(source.model)
    apart = {} if folder is None else {"the model": folder}
    target = check_output(output, overwrite=overwrite, needed_bytes=stored.bytes, apart=apart)
    record = stored.told(record_of(source.model))
    rows = _router(form, router_rows, record.plan)
    fitted = None if fit is None else fit_router(form, rows, fit, progress)
    rows = rows if fitted is None else fitted.rows
    record = _told(form, record, router_rows, advice, fitted, expand=expand)
    with completed_folder(Path(os.path.realpath(target))) as made:
        if form.plain.can_generate():
            form.plain.generation_config = source.model.generation_config
        vars(form.plain.config).update(stored.config)
        form.plain.save_pretrained(made, state_dict={})
        write_weights(form, made, rows, stored.experts)
        if folder is not None:
            copy_companions(folder, made)
        write_documents(record, folder, made, target.name)
    return record


def _router(form: PlainForm, router_rows: str, plan: dict[str, Any]) -> dict[str, State]:
    """Return the tensors of the plain routers; see `router_tensors`."""
    planned = plan.get("layers", {})
    biases = [bias_name(slot) for slot in form.slots] if router_rows == "logsumexp" else []
    weights = {
        slot.layer.name: row_weights(slot, router_rows, planned.get(slot.layer.original_name, {}))
        for slot in form.slots
    }
    rows = router_tensors(form, weights)
    for slot, name in zip(form.slots, biases, strict=False):
        if slot.is_combined:
            bias = rows[slot.layer.name][name]
            rows[slot.layer.name][name] = (bias.double() + group_bias(slot)).to(bias.dtype)
    return rows


def _told(
    form: PlainForm, record: Record, router_rows: str, advice: list[str], fitted: Fitted | None, *, expand: bool
) -> Record:
    """Return the record of the plain model, with its card."""
    kind, count = type(form.plain).__name__, form.num_experts
    if expand:
        line = f"`{kind}` with {count} experts a layer as before: each merged expert stands in all of its places."
    else:
        line = f"`{kind}` with {count} experts a layer."
    if any(slot.is_combined for slot in form.slots):
        line += f" Each group of merged experts has one row in the router (`{router_rows}`)."
    options = {"experts": count, "expand": expand} | ({} if expand else {"router_rows": router_rows})
    figures = {} if fitted is None else {"router": fitted.taken, "kl_to_merged": fitted.to_merged}
    lines = [line, *advice, *([] if fitted is None else fit_lines(fitted))]
    record = replace(record.with_step(Step(PLAIN, options, lines, figures)), is_plain=True)
    if fitted is not None:
        record = record.with_quality(_quality(fitted))
    with torch.device("meta"):
        costs = account(form.plain)
    record = replace(record, costs=record.costs | ({"plain": costs} if record.costs else {}))
    return replace(record, card=render(record))


def fit_lines(fitted: Fitted) -> list[str]:
    """Return what was measured of a fitted router, a sentence each."""
    told = ", ".join(f"{stage} {value:.4f}" for stage, value in fitted.to_merged.items() if stage != MERGED)
    return [
        f"KL to the merged model on held-out rows, in nats per position: {told}.",
        f"The router that did best was taken: {fitted.taken}.",
    ]


def _quality(fitted: Fitted) -> dict[str, Quality]:
    """Return the measures of the stages, that which was taken last."""
    others = {stage: value for stage, value in fitted.quality.items() if stage != fitted.taken}
    return {**others, fitted.taken: fitted.quality[fitted.taken]}
