"""Weights that are not finite, named before they spread: a single NaN makes NaN of all that a model says."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_mcsmoe.layers.checkpoint import find_tensors
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.layers.streaming import blocks

# Values that are widened together.
PIECE = 2**22


def check_weights(model: PreTrainedModel | Source | str | Path) -> None:
    """Make sure that all weights of a model are finite, wherever they are; each is read once.

    Args:
        model: a model, compressed or not, in memory or offloaded, or a folder with safetensors files, which is read
            tensor by tensor.

    Raises:
        ValueError: a weight holds NaN or is infinite; or no such folder.
    """
    if isinstance(model, str | Path | Folder):
        stored = model.stored if isinstance(model, Folder) else find_tensors(Path(model))
        for name, tensor in stored.items():
            check_tensor(name, tensor[...])
    else:
        _check_modules(source_of(model))


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError where a weight holds NaN or is infinite."""
    if tensor.is_meta or not tensor.is_floating_point() or _is_finite(tensor.detach()):
        return
    values = tensor.detach().float()
    place = tuple((~values.isfinite()).nonzero()[0].tolist())
    raise ValueError(
        f"The weight {name} is {float(values[place])} at {list(place)}: the checkpoint is damaged, or training or a "
        "cast to float16 broke it. Download it again, or take an earlier one."
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, DTensor):  # the extremes of a process whose part holds NaN may get lost among the others'
        return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
    if tensor.dtype.itemsize == 1:  # of these formats Torch knows no order
        return all(_is_finite(piece.float()) for piece in tensor.flatten().split(PIECE))
    # NaN is both of the extremes, which are found without a copy of the values.
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _check_modules(source: Source) -> None:
    """Check each module's own parameters, and its buffers that are saved, brought in where they are offloaded."""
    seen: set[int] = set()
    for path, module in source.model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own or all(id(tensor) in seen for tensor in own):
            continue
        seen.update(map(id, own))
        with source.loaded(path):
            check_own(path, module)


def check_all(path: str, module: nn.Module) -> None:
    """Raise ValueError where a weight of a module at `path` of its model, or of one in it, is not finite."""
    for name, child in module.named_modules():
        check_own(f"{path}.{name}" if name else path, child)


def check_outside(model: PreTrainedModel) -> None:
    """Raise ValueError where a weight that lies in no block of a model is not finite; those on meta are left out."""
    inside = tuple(f"{path}." for path in blocks(model))
    for path, module in model.named_modules():
        if not f"{path}.".startswith(inside):
            check_own(path, module)


def check_own(path: str, module: nn.Module) -> None:
    """Raise ValueError where a parameter or saved buffer of a module's own, at `path` of its model, is not finite."""
    for name, tensor in _own_tensors(module):
        check_tensor(f"{path}.{name}" if path else name, tensor)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    unsaved = module._non_persistent_buffers_set
    buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in unsaved]
    return [*module.named_parameters(recurse=False), *buffers]
