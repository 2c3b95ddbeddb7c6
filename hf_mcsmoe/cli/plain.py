"""`compress --plain`: what is checked before any work so that the result can be an ordinary checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.cli.display import notes
from hf_mcsmoe.cli.export import PlainForm
from hf_mcsmoe.export.architectures import check_architecture
from hf_mcsmoe.export.calibrate import RouterFit
from hf_mcsmoe.export.checkpoint import export
from hf_mcsmoe.export.engines import check_engines, nearest_count
from hf_mcsmoe.export.expected import Plain
from hf_mcsmoe.export.form import check_family, router_groups, shape_of
from hf_mcsmoe.export.sized import plain_size
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.choice import AUTO
from hf_mcsmoe.methods.config import UNIFORM, MergeConfig
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.record import Record
from hf_mcsmoe.search.config import MODEL, SizeConfig


def plain_asked(form: PlainForm, *, plain: bool) -> Plain | None:
    """Return which plain checkpoint is asked for; None for none.

    Raises:
        ValueError: options of one go without --plain.
    """
    if form.is_given and not plain:
        raise ValueError("--for, --router-rows, --expand and the like are about --plain: give that too.")
    return form.plain if plain else None


def check_unfitted(form: PlainForm | None, config: MergeConfig, size: SizeConfig | None) -> None:
    """Note that routers of merged experts are not fitted where the model is read block by block.

    Args:
        form: None where no plain checkpoint is made block by block.

    Raises:
        ValueError: it is asked for.
    """
    if form is None or form.expand or (size.reductions == ("prune",) if size else config.reduce == "prune"):
        return
    if form.router_steps != PlainForm.router_steps:
        raise ValueError(
            f"--router-steps {form.router_steps} fits the router with the result in memory, and the model is read "
            "block by block: leave it out, or leave out --plain and run hf-mcsmoe export --data on the result."
        )
    notes.print(
        "block by block the router's rows are combined and not fitted: without --plain, hf-mcsmoe export --data fits "
        "them, where the result fits into memory",
        soft_wrap=True,
    )


def plain_config(
    config: MergeConfig, size: SizeConfig | None, layers: Layers, plain: Plain | None
) -> tuple[MergeConfig, SizeConfig | None]:
    """Return the options of a merge, or of a size, whose result a plain checkpoint can hold and engines can run.

    Args:
        plain: None where no plain checkpoint is made, and all stays as it is.

    Raises:
        ValueError: layers of unlike numbers of experts are asked for, or a number that an engine cannot run.
    """
    if plain is None:
        return config, size
    engines = plain.engines
    check_family(layers)
    check_architecture(engines, type(layers.model).__name__, layers.model.config.model_type)
    if size is not None:
        found = plain_size(layers, size, plain, config.skip)
        if found != size:
            notes.print(_chosen_among(found, engines), soft_wrap=True)
        return config, found
    if config.budget == MergeConfig.budget:
        notes.print("every layer keeps as many experts, as a plain checkpoint needs (--budget uniform)")
        config = replace(config, budget=UNIFORM)
    config = replace(config, plain=True)
    held, groups = layers[0].num_experts, router_groups(layers[0])
    if isinstance(config.experts, int):
        check_engines(engines, shape_of(layers, config.experts))
        return config, None
    asked = max(1, round(config.experts * held))
    near = nearest_count(engines, shape_of(layers, asked - asked % groups or groups), most=held)
    if near is None:
        check_engines(engines, shape_of(layers, asked))
    elif near != asked:
        notes.print(f"{near} experts a layer in place of {asked}, which {' and '.join(engines) or 'routers'} can run")
    return replace(config, experts=near or asked), None


def _chosen_among(size: SizeConfig, engines: Sequence[str]) -> str:
    """Return what a size is chosen among for a plain checkpoint, as a sentence."""
    counts = "one number of experts for all layers" if size.uniform_experts else "numbers of experts"
    bits = f", {', '.join(map(str, size.bits))} bits" if size.bits else ", no fewer bits"
    alike = " (the same in all layers)" if size.bits and size.alike == MODEL else ""
    of = f", {size.reduce}d" if size.reduce != AUTO else ""
    readers = " and ".join(engines) or "a plain checkpoint"
    return f"chosen for the size among what {readers} can hold: {counts}{of}{bits}{alike}"


def write_plain(
    merged: PreTrainedModel,
    output: Path,
    form: PlainForm,
    fit: RouterFit | None,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> Record:
    """Write a compressed model as a plain checkpoint into a folder that was claimed; returns its record."""
    is_whole = all(layer.num_experts == layer.num_routed for layer in Layers.of(merged)) or form.expand
    fit = None if is_whole else fit
    record = export(merged, output, **form.plain.options, overwrite=True, fit=fit, progress=progress)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return record


def fit_of(
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    check: Sequence[Batch],
    original: Any,
    steps: int,
    record: Record,
) -> RouterFit | None:
    """Return what a plain router is fitted to; None without rows to fit and to judge.

    Args:
        record: of the result; where no divergence was measured of it, none tells routers apart.
    """
    fit: dict[str, Any] = {"steps": steps, "check": check, "calibration": record.calibration}
    judged = record.quality.get(record.judged or "")
    if not batches or not held_out or judged is None or judged.kl is None:
        return None
    return RouterFit(batches, held_out, original, **fit)
