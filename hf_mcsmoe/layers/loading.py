"""Loading a model and its tokenizer by path or Hub id."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_mcsmoe.layers.checkpoint import check_index
from hf_mcsmoe.layers.config_file import check_config_file
from hf_mcsmoe.layers.dequantize import dequantized, saved_plainly
from hf_mcsmoe.layers.memory import align
from hf_mcsmoe.layers.offloading import is_hooked
from hf_mcsmoe.modeling import modeling_mcsmoe
from hf_mcsmoe.modeling.configuration_mcsmoe import PREFIX, family_of
from hf_mcsmoe.modeling.generated_mcsmoe import known_class


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that the configuration's `architectures` names.

    Raises:
        ValueError: it names none of Transformers and none of ours, or one that holds several models and cannot run.
    """
    names = config.architectures or ["(none)"]
    name = names[0] if isinstance(names, list) else names
    ours, (_, variant) = isinstance(name, str) and name.startswith(PREFIX), family_of(type(config))
    found: Any = getattr(modeling_mcsmoe if ours else transformers, str(name), None)
    if variant and not ours:
        found = known_class(f"{name}__{variant}_mcsmoe")
        if found is None:
            raise ValueError(
                f"The configuration is of the variant {variant!r}, whose models are neither compressed nor run from a "
                "folder: name the model that it was made of."
            )
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"The configuration names the architecture {name!r}, which the installed Transformers lacks.")
    if found.forward is nn.Module.forward:
        raise ValueError(_without_forward(found, config))
    return found


def _without_forward(whole: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Say that a class cannot run by itself, and which of the models that it holds can be taken instead."""
    found, inside = vars(importlib.import_module(whole.__module__)).values(), [type(x) for x in vars(config).values()]
    models = [kind for kind in found if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    parts = [
        kind.__name__
        for kind in models
        if kind.config_class in inside and kind.can_generate() and kind.config_class.model_type in CONFIG_MAPPING
    ]
    advice = " or ".join(f"{part}.from_pretrained(...).save_pretrained(folder)" for part in parts)
    return f"{whole.__name__} holds several models and has no forward of its own to calibrate on: " + (
        f"save the part with the experts by itself, with {advice}, and compress that." if parts else "unsupported."
    )


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Return a model's configuration; code that lies beside it is never run.

    Raises:
        ValueError: there is no such model, or its config.json is damaged; see `check_config_file`.
    """
    check_config_file(name_or_path)
    with _told_as_damage(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


@contextlib.contextmanager
def _told_as_damage(name_or_path: str) -> Iterator[None]:
    """Tell of whatever values in a config.json lead to in Transformers, which takes most of them as they are."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or "no value of it may be so"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"The config.json of {name_or_path} makes no model ({kind}{told[:300]}): correct it, or download it again."
        ) from None


def empty_model(name_or_path: str, *, dtype: str = "auto", dequantize: bool = False) -> PreTrainedModel:
    """Return a model without weights, on the meta device: its structure costs neither memory nor a download.

    Args:
        dtype: see `load_model`; "auto" for the configuration's own.
        dequantize: see `load_model`.

    Raises:
        ValueError: see `load_config`, `model_class` and `dequantized`.
    """
    config = load_config(name_or_path)
    if dequantize:
        dequantized(config, name_or_path)
    kind = model_class(config)
    known = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    with _told_as_damage(name_or_path), torch.device("meta"):
        return kind._from_config(config, **known)


def load_model(
    name_or_path: str, *, dtype: str = "auto", device_map: str | None = None, dequantize: bool = False
) -> PreTrainedModel:
    """Return a model in evaluation mode.

    Args:
        dtype: "auto" for the checkpoint's own, or the name of a torch dtype.
        device_map: as in `from_pretrained`: "cpu", "cuda", "auto" ...
        dequantize: load quantized weights as those that they stand for, where Transformers can; the model then is as
            if it had never been quantized.

    Raises:
        ValueError: no such model, a damaged file, one that lacks weights (Transformers would invent them), or too
            little memory.
    """
    config = load_config(name_or_path)
    check_index(Path(name_or_path))
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    quantizer = dequantized(config, name_or_path) if dequantize else None
    if quantizer is not None:
        config.quantization_config = quantizer.quantization_config.to_dict() | {"dequantize": True}
        arguments["config"] = config
    arguments["trust_remote_code"] = False
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
    if not is_hooked(model):  # else what is offloaded comes from its file for each forward
        align(model)
    return model if quantizer is None else saved_plainly(model)


def _is_out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer; code that lies beside it is never run.

    Raises:
        ValueError: the model has none that loads without code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # whatever the values in its files lead to
        told = " ".join(str(error).split())
        raise ValueError(
            f"{name_or_path} has no tokenizer that loads ({told[:300]}); name one with --tokenizer."
        ) from None
