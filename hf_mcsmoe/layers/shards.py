"""A changed model written to a folder shard by shard, while the rest of it stays in the checkpoint it is made from."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_mcsmoe.layers.checkpoint import INDEX, tensors_of_file
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks


class ShardWriter:
    """Writes weights to a folder: what was changed module by module, then the rest of the model from its source.

    A shard is written under a temporary name and renamed, and the index comes last: a folder without it is not
    complete. No more than one module or one block is held.
    """

    def __init__(self, folder: Path, source: Folder) -> None:
        """Write to an existing folder a model that is made from that of `source`."""
        self.folder, self.source = folder, source
        self._shards: dict[Path, dict[str, torch.Tensor]] = {}  # what was written, on the meta device

    def write(self, path: str, module: nn.Module) -> None:
        """Write what `module` holds as the model's module `path`, and free it: its weights move to the meta device.

        What is on the meta device in it, a norm behind the experts, was not changed and is the source's.
        """
        held = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}
        self._write({f"{path}.{name}": tensor for name, tensor in held.items()})
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(module, name, nn.Parameter(empty, parameter.requires_grad))

    def take(self, file: Path) -> None:
        """Take a shard that was written before, as the next one."""
        self._shards[file] = {name: tensor.empty for name, tensor in tensors_of_file(file).items()}

    def write_all(self, path: str, module: nn.Module, stored: Mapping[str, str]) -> Path:
        """Write all that a checkpoint holds of the model's module `path`, as one shard; returns its file.

        Args:
            stored: of weights that are one, the name under which they are stored, by each of their names.
        """
        named = {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        self._write({name: tensor for name, tensor in named.items() if stored.get(name, name) == name})
        return next(reversed(self._shards))

    def write_rest(self, model: PreTrainedModel) -> None:
        """Write all that `model` has beyond what was written: what it holds, and what it lacks from the source.

        Raises:
            ValueError: a weight is on the meta device, and the source has none of its name and shape.
        """
        state, written = model.state_dict(keep_vars=True), set().union(*self._shards.values())
        if unknown := sorted(written - state.keys()):
            raise ValueError(f"{unknown[0]} was written, but {type(model).__name__} has no weight of this name.")
        # Of weights that are one, one is stored.
        done = {id(state[name]) for name in written}
        shapes = {name: tensor.shape for name, tensor in self.source.model.state_dict().items()}
        rest: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        of_model = blocks(model)
        for name, tensor in state.items():
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            if tensor.is_meta and shapes.get(name) != tensor.shape:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} of {type(model).__name__} was not written, and "
                    f"{self.source.model.name_or_path} has none of this shape."
                )
            rest[next((path for path in of_model if name.startswith(f"{path}.")), "")][name] = tensor
        for tensors in rest.values():
            with self.source.tensors([name for name, tensor in tensors.items() if tensor.is_meta]) as read:
                self._write(tensors | read)

    def placed(self, folder: Path) -> "ShardWriter":
        """Return what goes on in another folder, in which the shards lie as well from now on."""
        writer = ShardWriter(folder, self.source)
        for file, tensors in self._shards.items():
            _put(file, folder / file.name)
            writer._shards[folder / file.name] = tensors
        return writer

    def converted(self, folder: Path, convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Self:
        """Return what goes on in another folder, in which lies what `convert` makes of each shard."""
        writer = type(self)(folder, self.source)
        for file in self._shards:
            made = convert(load_file(file))
            writer._write({name: tensor.contiguous() for name, tensor in made.items()})
        return writer

    def close(self) -> None:
        """Give the shards their names and write the index; the folder is then complete."""
        weight_map: dict[str, str] = {}
        for number, (file, tensors) in enumerate(self._shards.items(), start=1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(file, self.folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        written = [tensor for tensors in self._shards.values() for tensor in tensors.values()]
        metadata = {
            "total_parameters": sum(tensor.numel() for tensor in written),
            "total_size": sum(tensor.nbytes for tensor in written),
        }
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        partial = self.folder / f"{INDEX}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.folder / INDEX)

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        if tensors:
            file = self.folder / f"part-{len(self._shards):05d}.safetensors"
            partial = file.with_suffix(".partial")
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"}
            )
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, file)
            self._shards[file] = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def as_stored(model: PreTrainedModel) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return what makes of weights of a model of Transformers the tensors that its family's checkpoints hold."""
    return lambda tensors: dict(revert_weight_conversion(model, tensors))


def _put(file: Path, place: Path) -> None:
    """Give a file a second name, or a copy where the disk has no second names."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
