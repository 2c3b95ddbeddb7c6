"""The record that a model carries: made anew, attached with its card, or read from where the model lies."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from yaml import YAMLError

from hf_mcsmoe.card import LICENCE, PIPELINES, planned_layers, render
from hf_mcsmoe.files import damage
from hf_mcsmoe.modeling.companions_mcsmoe import source_folder, source_of
from hf_mcsmoe.modeling.configuration_mcsmoe import auto_map, family_of
from hf_mcsmoe.modeling.convert import describe
from hf_mcsmoe.modeling.modeling_mcsmoe import layer_path
from hf_mcsmoe.modeling.plain_mcsmoe import plain_form
from hf_mcsmoe.modeling.saving_mcsmoe import (
    PLAN_FILE,
    RECORD_FILE,
)
from hf_mcsmoe.record import DROPPED, Base, Record, Step, Stored, public_name


def attach_record(model: PreTrainedModel, record: Record) -> None:
    """Let a compressed model carry its record, with the card rendered from it, to be saved beside the weights.

    What the record says of the layers is what the model's modules say now.
    """
    record = replace(record, layers=stored_layers(model, record.plan), is_plain=plain_form(model) is not None)
    cast(Any, model).mcsmoe_record = replace(record, card=render(record))


def stored_layers(model: PreTrainedModel, plan: Mapping[str, Any]) -> dict[str, Stored]:
    """Return what became of each layer that was planned, or that the configuration tells of, by the name there."""
    found = {name: Stored(item.before, item.before) for name, item in planned_layers(plan).items()}
    found |= {name: Stored.of(entry) for name, entry in describe(model)["layers"].items()}
    return {name: replace(item, bytes=_stored_bytes(model, name)) for name, item in found.items()}


def _stored_bytes(model: PreTrainedModel, name: str) -> int:
    tensors = model.get_submodule(layer_path(model, name)).state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def new_record(model: PreTrainedModel, plan: dict[str, Any]) -> Record:
    """Return the record of a model that was merged just now, still called as its original."""
    source = model.name_or_path or ""
    declared = declared_by(source)
    licence = {key: value for key, value in declared.items() if key in LICENCE}
    base = Base(public_name(source), model.config.base_model_type, licence, _languages(declared.get("language")))
    return Record(base, loading_class(model), plan, _dropped(model.config.mcsmoe.get("dropped", [])))


def _dropped(blocks: list[str]) -> tuple[Step, ...]:
    """Return the step that tells of the blocks that are not in the result; none where all are."""
    if not blocks:
        return ()
    names, are = ", ".join(f"`{path}`" for path in blocks), "are" if len(blocks) > 1 else "is"
    told = (
        f"{names} of the original {are} not in this model: Transformers does not load them, and they would have kept "
        "all their experts. Where they are layers that predict further tokens, engines decode without speculation."
    )
    return (Step(DROPPED, {"blocks": blocks}, [told]),)


def record_of(model: PreTrainedModel) -> Record:
    """Return the record of a compressed model: that which it carries, or that of the folder that it was loaded from.

    Of a folder without one, what its plan and its configuration tell; a file that cannot be read is warned of.
    """
    try:
        carried = cast(Any, model).mcsmoe_record
    except AttributeError:  # a class of the modelling files of format 1
        carried = None
    if carried is not None:
        return replace(carried, auto_class=loading_class(model))
    source = source_of(model)
    plan = _read(source / PLAN_FILE, _read_plan) if source else None
    record = _read(source / RECORD_FILE, partial(_read_record, plan=plan or {})) if source else None
    name = (plan or {}).get("model", "")
    record = record or Record(Base(name, model.config.base_model_type), plan=plan or {})
    # It may have been loaded under another head than it was saved with.
    return replace(record, auto_class=loading_class(model))


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """Return what a file says; None where there is none and, with a warning, where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is damaged and not used ({damage(error)}).", stacklevel=4)
        return None


def _read_plan(text: str) -> dict[str, Any]:
    plan = json.loads(text)
    render(Record(Base(plan["model"], plan["model_type"]), plan=plan))  # fails here, not amid a training
    return plan


def _read_record(text: str, plan: dict[str, Any]) -> Record:
    record = Record.from_json(text, plan)
    render(record)  # likewise
    return record


def loading_class(model: PreTrainedModel) -> str:
    """Return the Auto class that loads the model's own class."""
    entries = auto_map(*family_of(type(model.config))).items()
    names = [name for name, path in entries if path.rpartition(".")[2] == type(model).__name__]
    return next((name for name in names if name in PIPELINES), names[0] if names else "AutoModel")


def declared_by(source: str) -> dict[str, Any]:
    """Return the metadata of the source's own card; empty where it has none that can be read."""
    folder = source_folder(source)
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    try:
        return ModelCard.load(card).data.to_dict()
    except (OSError, ValueError, YAMLError):  # a card that nobody can read declares nothing
        return {}


def _languages(declared: Any) -> list[str]:
    """Return the languages that a card declares, be it one or several."""
    given = declared if isinstance(declared, list) else [declared]
    return [language for language in given if isinstance(language, str)]
