"""A plain checkpoint written block by block, under the family's own names."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from hf_mcsmoe.export.form import PlainForm, Slots
from hf_mcsmoe.export.router_rows import combined
from hf_mcsmoe.layers.checkpoint import INDEX, WEIGHTS
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks

# Blocks are gathered up to so many bytes in a file.
SHARD = 10**9

State = dict[str, torch.Tensor]
# What is made of a layer's experts, by the names in the model; see `dense_experts`.
Experts = Callable[[Slots], State]


class Shards:
    """The safetensors files of a checkpoint, one after the other; they have their names once all are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: State = {}
        self._written: list[list[str]] = []
        self.bytes = self.parameters = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors, or hold them until they fill a file."""
        for name, tensor in tensors.items():
            held = tensor.detach().cpu().contiguous()
            # Part of another's memory, of which a file would keep nothing or all.
            self._held[name] = held.clone() if held.untyped_storage().nbytes() > held.nbytes else held
            self.bytes, self.parameters = self.bytes + tensor.nbytes, self.parameters + tensor.numel()
        if sum(tensor.nbytes for tensor in self._held.values()) >= SHARD:
            self._write()

    def close(self) -> None:
        """Write what is held; several files get an index."""
        self._write()
        if len(self._written) == 1:
            os.replace(self._file(0), self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{len(self._written):05d}.safetensors"
            os.replace(self._file(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self.parameters, "total_size": self.bytes}
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (self.folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _write(self) -> None:
        if self._held:
            save_file(self._held, self._file(len(self._written)), {"format": "pt"})
            self._written.append(list(self._held))
            self._held = {}

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def write_weights(form: PlainForm, folder: Path, rows: Mapping[str, State], experts: Experts | None = None) -> Shards:
    """Write the weights of a plain form into a folder: block by block, converted as the family's checkpoints are.

    Args:
        rows: the tensors of each layer's router in the plain model, by the name of the layer and theirs.
        experts: what is made of a layer's experts; see `dense_experts`, the default. What is no weight of the plain
            model is named as on disk.
    """
    shards = Shards(folder)
    known = form.plain.state_dict().keys()
    for state in _states(form, rows, experts or dense_experts):
        converted = revert_weight_conversion(form.plain, {name: state[name] for name in state if name in known})
        shards.add(converted | {name: state[name] for name in state if name not in known})
    shards.close()
    return shards


def plain_state(form: PlainForm, rows: Mapping[str, State], experts: Experts) -> State:
    """Return the weights of a plain form by their names in the model, all of them in memory."""
    return {name: tensor for state in _states(form, rows, experts) for name, tensor in state.items()}


def _states(form: PlainForm, rows: Mapping[str, State], experts: Experts) -> Iterator[State]:
    """Yield the plain model's weights by name, of one block after the other, then what lies outside of them."""
    names, slots = _names(form), {slot.plain.name: slot for slot in form.slots}
    of_experts = {
        f"{slot.plain.name}.{name}": slot.plain.name for slot in form.slots for name, _ in slot.plain.parameters
    }
    given = {name: tensor for layer in rows.values() for name, tensor in layer.items()}
    for inside in _parts(form, names).values():
        state: State = {}
        for name in dict.fromkeys(of_experts[name] for name in inside if name in of_experts):
            state |= experts(slots[name])
        state |= {name: given[name] for name in inside if name in given}
        with _read(form, [name for name in inside if name not in of_experts and name not in given]) as read:
            yield state | read


def _parts(form: PlainForm, names: list[str]) -> dict[str, list[str]]:
    """Return the weights of each block by its path, and behind them those outside of all."""
    parts: dict[str, list[str]] = {path: [] for path in [*blocks(form.plain), ""]}
    for name in names:
        pieces = name.split(".")
        prefixes = (".".join(pieces[:depth]) for depth in range(1, len(pieces)))
        parts[next((prefix for prefix in prefixes if prefix in parts), "")].append(name)
    return parts


def _names(form: PlainForm) -> list[str]:
    """Return the names of the plain model's weights that are stored: of those that are one, the first."""
    source = form.model.state_dict(keep_vars=True)
    tied = {
        name
        for name, first in form.plain.all_tied_weights_keys.items()
        if name in source and source.get(first) is source[name]
    }
    ignored = {*tied, *(form.plain._keys_to_ignore_on_save or ())}
    return [name for name in form.plain.state_dict() if name not in ignored]


@contextlib.contextmanager
def _read(form: PlainForm, names: list[str]) -> Iterator[State]:
    """Yield the compressed model's weights of these names."""
    source = form.layers.source
    if isinstance(source, Folder):
        with source.tensors(names) as read:
            yield read
        return
    state: State = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        with source.loaded(owner) as module:
            held = {f"{owner}.{name}".lstrip("."): tensor for name, tensor in module.state_dict().items()}
            state |= {name: held[name].detach().clone() for name in names if name.rpartition(".")[0] == owner}
    yield state


def dense_experts(slots: Slots) -> State:
    """Return the experts of a plain layer by their names in the model; what is stored in other ways is made dense."""
    plain = slots.plain
    with slots.layer.open() as experts:
        dtype = slots.layer.model.dtype
        with _materialised(plain.container, [name for name, _ in plain.parameters], dtype):
            for role, views in plain.read().tensors.items():
                for place, stored in enumerate(slots.stored):
                    views[place].copy_(experts.tensors[role][stored])
            return {f"{plain.name}.{name}": parameter.detach() for name, parameter in plain.parameters}


@contextlib.contextmanager
def _materialised(container: nn.Module, names: list[str], dtype: torch.dtype) -> Iterator[None]:
    """Give some of a module's parameters, which are on the meta device, memory for the time of the block."""
    owners = {name: (container.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    empty: dict[str, Any] = {name: owner._parameters[own] for name, (owner, own) in owners.items()}
    for name, (owner, own) in owners.items():
        owner._parameters[own] = nn.Parameter(torch.empty_like(empty[name], dtype=dtype, device="cpu"), False)
    try:
        yield
    finally:
        for name, (owner, own) in owners.items():
            owner._parameters[own] = empty[name]


def router_tensors(form: PlainForm, weights: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """Return the tensors of the plain routers by the layer's name and their own: rows, biases, corrections.

    They are those that have an entry for each expert: in another number in the plain model than in the compressed one.

    Args:
        weights: of the router's rows in those of the places, by the layer's name; see `row_weights`.

    Raises:
        ValueError: a weight of the plain model is none of these and differs, or has no counterpart.
    """
    plain, source = form.plain.state_dict(), form.model.state_dict()
    experts = {f"{slot.plain.name}.{name}" for slot in form.slots for name, _ in slot.plain.parameters}
    found: dict[str, State] = {slot.layer.name: {} for slot in form.slots}
    paths = {id(module): path for path, module in form.model.named_modules()}
    near = {
        slot.layer.name: (f"{slot.layer.name.rpartition('.')[0]}.", f"{paths[id(slot.layer.router)]}.")
        for slot in form.slots
    }
    for name in (name for name in _names(form) if name not in experts):
        if name in source and source[name].shape == plain[name].shape:
            continue
        slot = max(form.slots, key=lambda slot: _common(name, slot.layer.name))
        try:
            if name not in source:
                raise ValueError("the compressed model has none")
            if not name.startswith(near[slot.layer.name]):
                raise ValueError("it is no part of a router of merged experts")
            with _read(form, [name]) as read:
                found[slot.layer.name][name] = combined(read[name], plain[name], weights[slot.layer.name])
        except ValueError as error:
            raise ValueError(
                f"{type(form.plain).__name__} keeps {name} otherwise than the compressed model does ({error}): the "
                "family has no plain form for it; save the model in our format."
            ) from None
    return found


def _common(name: str, other: str) -> int:
    """Return how many parts of two paths are the same, from the outermost on."""
    pairs = enumerate(zip(name.split("."), other.split("."), strict=False))
    return next((depth for depth, (one, two) in pairs if one != two), len(other))
