"""Nests of tensors in files, from which they are mapped."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mcsmoe.layers.memory import ALIGNED


def write_nest(file: Path, value: Any) -> None:
    """Write tensors, or tuples and lists of such and of None, to a file, and which of them take gradients.

    Raises:
        TypeError: something else is in there.
    """
    tensors: list[torch.Tensor] = []
    form = _taken(value, tensors)
    entries: list[tuple[str, list[int], int, bool]] = []
    offset = 0
    for tensor in tensors:
        entries.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, tensor.requires_grad))
        offset += _rounded(tensor.nbytes)
    header = json.dumps({"form": form, "tensors": entries}).encode()
    start = _rounded(8 + len(header))
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor, (_, _, place, _) in zip(tensors, entries, strict=True):
            out.seek(start + place)
            out.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        out.truncate(start + offset)


def read_nest(file: Path, *, mapped: bool) -> Any:
    """Return what `write_nest` wrote, mapped from the file or in memory. Writing to it does not change the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content, start = json.loads(opened.read(length)), _rounded(8 + length)
        if mapped:  # by Torch, which keeps no file open: there may be thousands
            data = torch.from_file(str(file), size=os.fstat(opened.fileno()).st_size, dtype=torch.uint8)
        else:
            data = torch.empty(os.fstat(opened.fileno()).st_size, dtype=torch.uint8)
            opened.seek(0)
            opened.readinto(data.numpy().data)
    tensors = []
    for name, shape, offset, takes_gradients in content["tensors"]:
        dtype = getattr(torch, name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensor = data[start + offset : start + offset + size].view(dtype).view(shape)
        tensors.append(tensor.requires_grad_(takes_gradients))
    return _given(content["form"], tensors)


def spooled(value: Any, place: Path) -> Any:
    """Return a nest mapped from a file on the disk of a folder; it has no name there, and is gone with its tensors.

    Raises:
        TypeError: see `write_nest`.
    """
    with tempfile.NamedTemporaryFile(dir=place, prefix=".mcsmoe-") as file:
        write_nest(Path(file.name), value)
        return read_nest(Path(file.name), mapped=True)


def _rounded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _taken(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the form of a value as JSON, and add its tensors to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if value is None:
        return None
    if type(value) in (tuple, list):
        return [type(value).__name__, [_taken(one, tensors) for one in value]]
    raise TypeError(f"A block returned {type(value).__name__}, which is not kept: load the model (--no-stream).")


def _given(form: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Return the value of a form."""
    if isinstance(form, list):
        kind: Callable[[Any], Any] = tuple if form[0] == "tuple" else list
        return kind(_given(one, tensors) for one in form[1])
    return None if form is None else tensors[form]
