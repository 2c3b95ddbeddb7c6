"""Ways to keep a tiny Mixtral's weights off the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
from transformers import AutoModelForCausalLM, PreTrainedModel


def _loaded_to_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    where: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder, **where)


def _loaded_in_parts(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    places = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(4)}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")


OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model),
    "disk": accelerate.disk_offload,
    "loaded to disk": _loaded_to_disk,
    "loaded in parts": _loaded_in_parts,
}
