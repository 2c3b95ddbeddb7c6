"""What blocks returned to the forwards that pass them, on disk: a run that was killed goes on from there.

A finished block is not run again, nor loaded: it returns what is stored, and all that the model does around its blocks
(masks, positions, embeddings) is done anew. Of each list of blocks the output of the last finished one is kept; those
before it return the same, for nothing but the next block reads it.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_mcsmoe.layers.batches import hooks
from hf_mcsmoe.layers.memory import ALIGNED
from hf_mcsmoe.layers.streaming import blocks, current_key, has_passed, is_between_blocks
from hf_mcsmoe.streamed.parts import Key


class States:
    """The outputs of the last finished blocks, a file a forward and list of blocks."""

    def __init__(self, folder: Path, order: Sequence[str], *, mapped: bool = False) -> None:
        """Keep them in a folder.

        Args:
            order: the paths of all blocks.
            mapped: whether forwards go on with what is mapped from the files, rather than in memory.
        """
        self.folder, self.mapped = folder, mapped
        self._numbers = {path: number for number, path in enumerate(order)}
        self._resumed: dict[tuple[str, Key], Any] = {}

    @contextlib.contextmanager
    def kept(self, model: nn.Module, finished: Sequence[str]) -> Iterator[None]:
        """Store what the blocks of a model return within the `with` block; those that are finished return that."""
        of_model = blocks(model)
        with hooks() as handles:
            for path, module in of_model.items():
                if path in finished:
                    module.forward = partial(self._stored, path, _last(path, finished))
                else:
                    handles.append(module.register_forward_hook(partial(self._store, path)))
            try:
                yield
            finally:
                for path in finished:
                    vars(of_model[path]).pop("forward", None)

    @contextlib.contextmanager
    def replayed(self, model: nn.Module, passed: Sequence[str], *keys: Key) -> Iterator[None]:
        """Let the blocks that were `passed` return what the last of their list did to the first of `keys` it is of."""
        modules = {path: vars(block) for path, block in blocks(model).items() if path in passed}
        before = {path: own["forward"] for path, own in modules.items() if "forward" in own}
        read: dict[str, Any] = {}
        for path, own in modules.items():
            own["forward"] = partial(self._replay, read, _last(path, passed), keys)
        try:
            yield
        finally:
            for path, own in modules.items():
                own.pop("forward")
                own |= {"forward": before[path]} if path in before else {}

    def _replay(self, read: dict[str, Any], last: str, keys: Sequence[Key], *_: Any, **__: Any) -> Any:
        if last not in read:
            file = next(file for file in (self._file(last, key) for key in keys) if file.exists())
            read[last] = read_nest(file, mapped=self.mapped)
        return read[last]

    def forget(self, path: str) -> None:
        """Remove what blocks before `path` in its list returned: this one is finished, and the journal knows."""
        for earlier in [other for other in self._numbers if _list_of(other) == _list_of(path)]:
            if self._numbers[earlier] < self._numbers[path]:
                for file in self.folder.glob(f"{self._numbers[earlier]:05d}.*"):
                    file.unlink()

    def clear(self) -> None:
        """Remove all of them."""
        for file in self.folder.glob("?????.*"):
            file.unlink()

    def _file(self, path: str, key: Key) -> Path:
        return self.folder / f"{self._numbers[path]:05d}.{key.stream.replace(' ', '-')}.{key.kind}.{key.number:05d}"

    def _store(self, path: str, module: nn.Module, arguments: Any, output: Any) -> Any:
        key = current_key()
        if not isinstance(key, Key) or not is_between_blocks() or has_passed(path):
            return None
        write_nest(self._file(path, key), output)
        return read_nest(self._file(path, key), mapped=True) if self.mapped else None

    def _stored(self, path: str, last: str, *_: Any, **__: Any) -> Any:
        key = current_key()
        place = _list_of(path), key
        if place not in self._resumed:
            self._resumed[place] = read_nest(self._file(last, key), mapped=self.mapped)
        return self._resumed.pop(place) if path == last else self._resumed[place]


def _list_of(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str, finished: Sequence[str]) -> str:
    """Return the last finished block of the list that `path` is in."""
    return [other for other in finished if _list_of(other) == _list_of(path)][-1]


def write_nest(file: Path, value: Any) -> None:
    """Write tensors, or tuples and lists of such and of None, to a file.

    Raises:
        TypeError: something else is in there.
    """
    tensors: list[torch.Tensor] = []
    form = _taken(value, tensors)
    entries: list[tuple[str, list[int], int]] = []
    offset = 0
    for tensor in tensors:
        entries.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset))
        offset += _rounded(tensor.nbytes)
    header = json.dumps({"form": form, "tensors": entries}).encode()
    start = _rounded(8 + len(header))
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for tensor, (_, _, place) in zip(tensors, entries, strict=True):
            out.seek(start + place)
            out.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        out.truncate(start + offset)


def read_nest(file: Path, *, mapped: bool) -> Any:
    """Return what `write_nest` wrote, mapped from the file or in memory. Writing to it does not change the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content, start = json.loads(opened.read(length)), _rounded(8 + length)
        if mapped:
            place = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            data = torch.from_numpy(np.frombuffer(place, np.uint8))
        else:
            data = torch.empty(os.fstat(opened.fileno()).st_size, dtype=torch.uint8)
            opened.seek(0)
            opened.readinto(data.numpy().data)
    tensors = []
    for name, shape, offset in content["tensors"]:
        dtype = getattr(torch, name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensors.append(data[start + offset : start + offset + size].view(dtype).view(shape))
    return _given(content["form"], tensors)


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
