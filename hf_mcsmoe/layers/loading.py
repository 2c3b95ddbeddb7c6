"""Loading a model and its tokenizer by path or Hub id, and checking where a result is to be written."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.modeling import modeling_mcsmoe
from hf_mcsmoe.modeling.configuration_mcsmoe import PREFIX


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that the configuration's `architectures` names.

    Raises:
        ValueError: it names none of Transformers and none of ours.
    """
    name = (config.architectures or ["(none)"])[0]
    if name.startswith(PREFIX):
        return getattr(modeling_mcsmoe, name)
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"The configuration names the architecture {name!r}, which the installed Transformers lacks.")
    return found


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Return a model's configuration.

    Raises:
        ValueError: there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        if Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~")):
            raise ValueError(f"{name_or_path} is no folder with a model that Transformers can load: {error}") from None
        raise ValueError(f"Found no model {name_or_path!r}, neither as a folder nor on the Hub: {error}") from None


def empty_model(name_or_path: str) -> PreTrainedModel:
    """Return a model without weights, on the meta device: its structure costs neither memory nor a download."""
    config = load_config(name_or_path)
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def load_model(name_or_path: str, *, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """Return a model in evaluation mode.

    Args:
        dtype: "auto" for the checkpoint's own, or the name of a torch dtype.
        device_map: as in `from_pretrained`: "cpu", "cuda", "auto" ...

    Raises:
        ValueError: no such model, a damaged file, one that lacks weights (Transformers would invent them), or too
            little memory.
    """
    config = load_config(name_or_path)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    try:
        model, info = cast(Any, model_class(config)).from_pretrained(name_or_path, **arguments)
    except (SafetensorError, OSError, RuntimeError, EOFError, MemoryError) as error:
        if _is_out_of_memory(error):
            raise ValueError(
                f"There is too little memory for {name_or_path} ({error}). Spread it over what there is with "
                "--device-map auto (device_map), or load it in a smaller --dtype (bfloat16)."
            ) from None
        raise ValueError(f"Cannot load {name_or_path}: {error}. If a file is damaged, download it again.") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"{name_or_path} lacks {len(lacking)} of the model's weights ({lacking[0]}, ...): the download is "
            "incomplete or the checkpoint belongs to another class."
        )
    return model


def _is_out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        ValueError: the model has none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name_or_path} has no tokenizer that loads ({error}); name one with --tokenizer.") from None


def check_output(path: str | os.PathLike, *, overwrite: bool, needed_bytes: int) -> Path:
    """Return the output folder after making sure, before any work, that a result can be written there.

    Raises:
        ValueError: it exists and is not empty (without `overwrite`), is a file, cannot be written, or the disk is too
            small for `needed_bytes`.
    """
    target = Path(path).expanduser()
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists and is not empty; choose another folder or pass --overwrite.")
    existing = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, so {target} cannot be a folder; choose another --output.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written to; choose another --output.")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"The result takes about {needed_bytes / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free."
        )
    return target
