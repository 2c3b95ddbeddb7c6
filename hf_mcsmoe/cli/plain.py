"""`compress --plain`: what is checked before any work so that the result can be an ordinary checkpoint."""

from collections.abc import Callable, Sequence
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
from hf_mcsmoe.export.form import check_family, router_groups, shape_of
from hf_mcsmoe.export.router_rows import bias_name
from hf_mcsmoe.export.stored import check_mxfp4
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.methods.config import UNIFORM, MergeConfig
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.record import Calibration, Record
from hf_mcsmoe.search.config import SizeConfig


def check_plain_asked(form: PlainForm, layers: Layers, *, plain: bool, stages: dict[str, Any]) -> None:
    """Raise ValueError where options of a plain checkpoint go without --plain, or with what no such one can hold."""
    if not plain:
        if form.is_given:
            raise ValueError("--for, --router-rows, --expand and the like are about --plain: give that too.")
        return
    check_family(layers)
    if stages["low_rank"] and not form.dense:
        raise ValueError(
            f"--rank {stages['low_rank'].rank} stores experts as no model of the family's class does: leave it out, "
            "or multiply them out with --dense."
        )
    if form.mxfp4:
        check_mxfp4(layers, is_dense=form.dense or not (stages["quantization"] or stages["size"]))
    if form.router_rows == "logsumexp":
        for layer in layers:
            bias_name(layer)


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


def form_bytes(form: PlainForm | None, result: int, whole: int) -> int:
    """Return about how many bytes a plain form takes, which is made while the result lies beside it; None for none.

    Args:
        result: bytes of the result in our own format.
        whole: of the model with all of its experts.
    """
    return 0 if form is None else whole if form.expand else result


def exported(form: PlainForm, progress: Progress) -> Callable[[Path, Path], Record]:
    """Return what makes of the folder of a compressed model, block by block, a plain checkpoint in another one."""
    return lambda ours, output: export(Folder(ours), output, **form.options, overwrite=True, progress=progress)


def plain_config(config: MergeConfig, size: SizeConfig | None, layers: Layers, engines: Sequence[str]) -> MergeConfig:
    """Return the options of a merge whose result a plain checkpoint can hold, and engines can run.

    Raises:
        ValueError: layers of unlike numbers of experts are asked for, or a number that an engine cannot run.
    """
    check_architecture(engines, type(layers.model).__name__, layers.model.config.model_type)
    if size is not None:
        return _sized(config, size, layers)
    if config.budget == MergeConfig.budget:
        notes.print("every layer keeps as many experts, as a plain checkpoint needs (--budget uniform)")
        config = replace(config, budget=UNIFORM)
    config = replace(config, plain=True)
    held, groups = layers[0].num_experts, router_groups(layers[0])
    if isinstance(config.experts, int):
        check_engines(engines, shape_of(layers, config.experts))
        return config
    asked = max(1, round(config.experts * held))
    near = nearest_count(engines, shape_of(layers, asked - asked % groups or groups), most=held)
    if near is None:
        check_engines(engines, shape_of(layers, asked))
    elif near != asked:
        notes.print(f"{near} experts a layer in place of {asked}, which {' and '.join(engines) or 'routers'} can run")
    return replace(config, experts=near or asked)


def _sized(config: MergeConfig, size: SizeConfig, layers: Layers) -> MergeConfig:
    if not size.uniform_experts:
        raise ValueError(
            "--size chooses a number of experts for each layer, and a plain checkpoint has one for all: give "
            "--uniform-experts as well."
        )
    if (groups := router_groups(layers[0])) > 1:
        raise ValueError(
            f"--size does not keep the {groups} groups apart that these routers pick among, as a plain checkpoint "
            "must: say with --experts how many to keep."
        )
    return config


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
    record = export(merged, output, **form.options, overwrite=True, fit=fit, progress=progress)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return record


def fit_of(
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    check: Sequence[Batch],
    original: Any,
    steps: int,
    calibration: Calibration,
) -> RouterFit | None:
    """Return what a plain router is fitted to; None without rows to fit and to judge."""
    fit: dict[str, Any] = {"steps": steps, "check": check, "calibration": calibration}
    return RouterFit(batches, held_out, original, **fit) if batches and held_out else None
