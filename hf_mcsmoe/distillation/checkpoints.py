"""Checkpoints of a Trainer: whether a model can resume from one, and which is the last."""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from hf_mcsmoe.distillation.seal import flaw, is_sealed, sealed_run
from hf_mcsmoe.low_rank.pruning import OPTIONS_FILE, SparsificationCallback

WEIGHTS = {True: "adapter_model*.safetensors", False: "model*.safetensors"}


def check_checkpoint(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Check, before anything is loaded, that a Trainer wrote `folder` for a model such as this one.

    Raises:
        ValueError: its model is of another family, with other experts, other low-rank factors, other sizes or other
            adapters.
    """
    written = _read(folder / "config.json")
    adapted = isinstance(model, PeftModel)
    if adapted != (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} was written {'without' if adapted else 'with'} adapters (train_parts='lora'), this run has "
            f"{'them' if adapted else 'none'}: resume with the train_parts that the run began with."
        )
    if found := _other_model(written, model) or _other_adapters(folder, model) or _other_shape(folder, model):
        raise ValueError(f"{folder} holds a checkpoint of another model: {found}.")


def resumable_flaw(folder: Path) -> str:
    """Say in a sentence why no run can go on from `folder`; "" where it is a whole checkpoint."""
    if not folder.is_dir():
        return f"There is no checkpoint {folder} to resume from."
    if not is_sealed(folder) and not (folder / TRAINER_STATE_NAME).is_file():
        return f"{folder} is no checkpoint of a Trainer (it has no {TRAINER_STATE_NAME}): nothing resumes."
    reason = flaw(folder)
    return reason and f"No run goes on from {folder}: {reason}. Name an earlier checkpoint, or start anew."


def check_run(folder: Path, identity: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Compare a run with the one that wrote a checkpoint; other arguments that do not change its rows are warned of.

    Args:
        identity: what makes it another run where it differs, by name; an empty text is not known.
        arguments: those of the Trainer that decide on the result.

    Raises:
        ValueError: other rows, another order of them, or whatever else is in `identity`.
    """
    written = sealed_run(folder)
    other = _changes(written["identity"], identity)
    if other:
        raise ValueError(
            f"{folder} is of another run ({other}), and going on from it would end as neither: resume as the run "
            "began, or start anew."
        )
    changed = _changes(written["arguments"], arguments)
    if changed:
        warnings.warn(
            f"The run goes on from {folder.name} with other arguments than it began with ({changed}), so it will not "
            "end as it would have without the interruption.",
            stacklevel=4,
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what differs among what both know: an empty text is not known."""
    pairs = {name: (before[name], value) for name, value in now.items() if name in before}
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and "" not in pair}
    return ", ".join(f"{name}: {_short(old)} before, {_short(new)} now" for name, (old, new) in changed.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True)
class Found:
    """The last whole checkpoint of a folder, if there is one, and why those after it are none.

    Args:
        skipped: a sentence each.
        damaged: whether one of those was written to its end once, so that there was something to go on from.
    """

    path: Path | None = None
    skipped: tuple[str, ...] = ()
    damaged: bool = False


def last_checkpoint(output_dir: Path, *, thorough: bool = True) -> Found:
    """Return the checkpoint of the most steps that is whole, see `flaw`."""
    skipped: list[str] = []
    damaged = False
    for path in _newest_first(output_dir):
        if not (reason := flaw(path, thorough=thorough)):
            return Found(path, tuple(skipped), damaged)
        skipped.append(f"No run goes on from {path}: {reason}.")
        damaged = damaged or is_sealed(path)
    return Found(None, tuple(skipped), damaged)


def train_or_resume(trainer: Trainer) -> None:
    """Train; where `resume_from_checkpoint` is "last", go on from the last whole checkpoint, if there is one.

    Where all that there is was killed while it was written, the run begins anew, and a warning says so.

    Raises:
        ValueError: there are checkpoints, but those that were written to their end are damaged.
    """
    resume: Any = trainer.args.resume_from_checkpoint
    if resume == "last":
        found = last_checkpoint(Path(str(trainer.args.output_dir)), thorough=False)
        if found.path is None and not found.damaged:
            for sentence in found.skipped:
                warnings.warn(sentence, stacklevel=2)
        resume = found.path is not None or found.damaged
    trainer.train(resume_from_checkpoint=resume)


def check_pruning(folder: Path, callbacks: Iterable[TrainerCallback]) -> None:
    """Raise ValueError where a checkpoint is of a run that prunes S, and no callback would go on with it."""
    if (folder / OPTIONS_FILE).is_file() and not any(isinstance(item, SparsificationCallback) for item in callbacks):
        raise ValueError(
            f"{folder} is of a run that prunes S, which this one would not: resume with the SparsificationCallback "
            f"that the run began with (its options are in {OPTIONS_FILE})."
        )


def _newest_first(output_dir: Path) -> list[Path]:
    found = [(int(name[1]), path) for path in output_dir.glob("*") if (name := _checkpoint_name(path))]
    return [path for _, path in sorted(found, reverse=True)]


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder has the name that a Trainer gives to what it resumes from."""
    return _checkpoint_name(folder) is not None


def _checkpoint_name(folder: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", folder.name)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _other_model(written: dict[str, Any], model: PreTrainedModel | PeftModel) -> str:
    """Say how the configuration in a checkpoint differs from the model's, as far as weights depend on it; or ""."""
    ours = model.config.to_dict()
    if not written:  # in parts, one per process, each of which is checked when it is loaded
        return ""
    families = [item.get("base_model_type") or item.get("model_type") for item in (written, ours)]
    if families[0] != families[1]:
        return f"it is of type {families[0]!r}, not {families[1]!r}"
    layers = [(item.get("mcsmoe") or {"layers": {}})["layers"] for item in (written, ours)]
    maps = [{name: (layer.get("expert_map"), layer.get("kept")) for name, layer in item.items()} for item in layers]
    if maps[0] != maps[1]:
        return "its experts are grouped differently"
    for name in layers[1]:
        theirs, mine = (item[name].get("low_rank", {}) for item in layers)
        if theirs != mine:
            return f"{name} is stored as {_low_rank(theirs)} there and as {_low_rank(mine)} here"
    return ""


def _low_rank(entry: dict[str, dict[str, Any]]) -> str:
    """Describe how a layer's weights are stored."""
    parts = []
    for name, item in entry.items():
        rows = "all" if item["kept_rows"] is None else sum(item["kept_rows"])
        parts.append(f"{name} of rank {item['rank']} with {rows} rows of S")
    return " and ".join(parts) or "dense experts"


def _other_adapters(folder: Path, model: PreTrainedModel | PeftModel) -> str:
    if not isinstance(model, PeftModel):
        return ""
    written, ours = _read(folder / "adapter_config.json"), model.active_peft_config
    for name, value in (("r", ours.r), ("lora_alpha", ours.lora_alpha)):
        if written.get(name) != value:
            return f"its adapters have {name}={written.get(name)}, those here {value}"
    return ""


def _other_shape(folder: Path, model: PreTrainedModel | PeftModel) -> str:
    """Say which weight of a checkpoint has another shape than the model's; or ""."""
    adapted = isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model) if adapted else model.state_dict()
    for name, part in _weights(folder, adapted):
        shape = tuple(part.get_slice(name).get_shape())
        is_here = name in state and state[name].numel() > 0  # not in another process
        if is_here and shape != tuple(state[name].shape):
            return f"{name} has the shape {shape} there and {tuple(state[name].shape)} here"
        if adapted and name not in state:
            return f"it adapts {name}, which is not adapted here"
    return ""


def _weights(folder: Path, adapted: bool) -> Iterator[tuple[str, Any]]:
    """Yield the names of the weights in a checkpoint, each with its open file."""
    for file in sorted(folder.glob(WEIGHTS[adapted])):
        with safe_open(file, framework="pt") as part:
            for name in part.keys():  # noqa: SIM118, it is no dictionary
                yield name, part
