"""Layers with constants in the place of pruned experts as vLLM stores them (MoNE, arXiv 2507.00390).

Routers know all experts. `approximate_experts` of the configuration says which gave way, a list for each block, and
their constants lie beside the others by their numbers, `<experts>.<id>.approx_value`; those that are left keep theirs.
Layers may have unlike numbers. Read from vLLM 0.33: expert_substitution.py of layers/fused_moe and of models. Nothing
else knows the format, Transformers included.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from hf_mcsmoe.export.form import PlainForm, Slots
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.modeling.plain_mcsmoe import empty_plain

ENGINE = "vllm"
# What the constants of a layer are called in its container.
CONSTANTS = "approx_value"


def is_substituted(layers: Layers, engines: Sequence[str]) -> bool:
    """Tell whether layers have constants, and are for the one engine that knows them."""
    return list(engines) == [ENGINE] and any(layer.num_constants for layer in layers)


def substituted_form(layers: Layers) -> PlainForm:
    """Return the form of a model with constants: the family's own model of as many experts as before.

    Raises:
        ValueError: experts are merged, in few bits or low rank + sparse, or a block's number is not the only one in a
            layer's name, by which vLLM finds its constants; or the family stores experts otherwise than by one matrix
            each.
    """
    for layer in layers:
        _check(layer, layers.model.config.mcsmoe["layers"].get(layer.name, {}))
    count = layers[0].num_routed
    plain = empty_plain(layers.model, count, count)
    places = list(range(count))
    pairs = zip(layers, Layers.of(InMemory(plain)), strict=True)
    slots = [Slots(old, new, places, [[place] for place in places]) for old, new in pairs]
    for slot in slots:
        _by_number(slot, {name: tensor.detach() for name, tensor in slot.plain.parameters})
    return PlainForm(layers, plain, slots)


def _by_number(slots: Slots, tensors: dict[str, torch.Tensor]) -> list[tuple[str, int, str, torch.Tensor]]:
    """Return the matrices of stacked experts as they lie on disk: prefix, number, the rest of the name, and values.

    Raises:
        ValueError: the family stores experts otherwise than by one matrix each.
    """
    stacks = {f"{slots.plain.name}.{name}": tensor for name, tensor in tensors.items()}
    found = []
    for name, tensor in revert_weight_conversion(slots.plain.model, stacks).items():
        parts = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*\.weight)", name)
        if parts is None:
            raise ValueError(
                f"{type(slots.plain.model).__name__} keeps the experts of a layer in one tensor on disk ({name}), of "
                "which vLLM cannot leave some out: prune with pruned_router='slice'."
            )
        prefix, number, rest = parts.groups()
        found.append((prefix, int(number), rest, tensor))
    return found


def _check(layer: MoELayer, entry: dict[str, Any]) -> None:
    if layer.merged and not layer.num_constants:
        raise ValueError(
            f"{layer.name} has no constants, and other layers have: prune all with pruned_router='constant', or leave "
            "that layer as it was (skip)."
        )
    if entry.get("quantized") or entry.get("low_rank"):
        raise ValueError(f"vLLM takes constants beside dense experts alone, and those of {layer.name} are not dense.")
    if sum(part.isdigit() for part in layer.name.split(".")) != 1:
        raise ValueError(f"vLLM finds constants by the only number in a layer's name, and {layer.name} has others.")


def approximate_experts(form: PlainForm) -> dict[str, list[int]]:
    """Return which experts gave way to constants, by the number of their block."""
    layers: dict[str, Any] = form.model.config.mcsmoe["layers"]
    gone = {_block(slot.layer.name): layers.get(slot.layer.name, {}) for slot in form.slots}
    return {block: entry["approximate_experts"] for block, entry in gone.items() if entry.get("approximate_experts")}


def _block(name: str) -> str:
    return next(part for part in name.split(".") if part.isdigit())


def substituted_experts(slots: Slots) -> dict[str, torch.Tensor]:
    """Return the experts of a layer that are left, and the constants in the others' places, by their names on disk."""
    layer = slots.layer
    entry: dict[str, Any] = layer.model.config.mcsmoe["layers"].get(layer.name, {})
    gone, places = set(entry.get("approximate_experts", ())), entry.get("expert_map") or slots.stored
    with layer.source.loaded(layer.name) as experts:
        tensors = {name: tensor.detach() for name, tensor in experts.named_parameters()}
    constants = tensors.pop(CONSTANTS, None)
    numbers = {at: expert for expert, at in enumerate(places) if expert not in gone}
    state = {}
    for prefix, number, rest, tensor in _by_number(slots, tensors):
        state[f"{prefix}.{numbers[number]}.{rest}"] = tensor
        if constants is not None:
            for one in gone:  # zeros are one constant for all of them
                state[f"{prefix}.{one}.{CONSTANTS}"] = constants[places[one] - layer.num_experts].clone()
    return state


def substituted_bytes(slots: Slots) -> int:
    """Return the bytes of what `substituted_experts` returns."""
    layer = slots.layer
    kept = sum(parameter.nbytes for name, parameter in layer.parameters if name != CONSTANTS)
    gone = layer.num_routed - layer.num_experts if layer.num_constants else 0
    return kept + gone * layer.hidden_size * layer.model.dtype.itemsize
