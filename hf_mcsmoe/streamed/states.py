"""What blocks returned to the forwards that pass them, on disk: a run that was killed goes on from there.

A finished block is not run again, nor loaded: it returns what is stored, and all that the model does around its blocks
(masks, positions, embeddings) is done anew. Of each list of blocks the output of the last finished one is kept; those
before it return the same, for nothing but the next block reads it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.layers.batches import hooks
from hf_mcsmoe.layers.nest import read_nest, write_nest
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
        self._numbers = {path: number for number, path in enumerate([*order, ""])}
        self._resumed: dict[tuple[str, Key], Any] = {}

    @contextlib.contextmanager
    def kept(self, model: nn.Module, finished: Sequence[str], *, each: bool = False) -> Iterator[None]:
        """Store what the blocks of a model return within the `with` block; those that are finished return that.

        Args:
            each: whether each returns its own, where none was forgotten. If not, no loss reads what routers say, which
                those of finished blocks do not.
        """
        of_model = blocks(model)
        with hooks() as handles, contextlib.nullcontext() if each else _unrecorded(model):
            for path, module in of_model.items():
                if path in finished:
                    module.forward = partial(self._stored, path, path if each else _last(path, finished))
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
        for earlier in [other for other in self._numbers if other and _list_of(other) == _list_of(path)]:
            if self._numbers[earlier] < self._numbers[path]:
                for file in self.folder.glob(f"{self._numbers[earlier]:05d}.*"):
                    file.unlink()

    def keep(self, path: str, name: str, value: Any) -> Any:
        """Store something else that belongs to a block, "" for none, by a name, and return it as outputs are."""
        file = self._file(path, self._own(name))
        write_nest(file, value)
        return read_nest(file, mapped=True) if self.mapped else value

    def held(self, name: str, paths: Sequence[str]) -> Any:
        """Return what `keep` stored of the last of some blocks of which it did; None where it did of none."""
        files = [self._file(path, self._own(name)) for path in paths]
        last = next((file for file in reversed(files) if file.exists()), None)
        return None if last is None else read_nest(last, mapped=self.mapped)

    def drop(self, name: str, path: str, before: Sequence[str]) -> None:
        """Remove what `keep` stored of earlier blocks, where it did of the same forward at this one."""
        for file in self.folder.glob(f"{self._numbers[path]:05d}.{name}.*"):
            for other in before:
                file.with_name(f"{self._numbers[other]:05d}{file.name[5:]}").unlink(missing_ok=True)

    def _own(self, name: str) -> Key:
        key = current_key()
        return Key(name, key.kind, key.number)

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


@contextlib.contextmanager
def _unrecorded(model: nn.Module) -> Iterator[None]:
    """Let a model record no router logits for the time of the block, whatever its configuration says."""
    found = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    said = [config for config in found.values() if getattr(config, "output_router_logits", False)]
    try:
        for config in said:
            config.output_router_logits = False
        yield
    finally:
        for config in said:
            config.output_router_logits = True


def _list_of(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str, finished: Sequence[str]) -> str:
    """Return the last finished block of the list that `path` is in."""
    return [other for other in finished if _list_of(other) == _list_of(path)][-1]
