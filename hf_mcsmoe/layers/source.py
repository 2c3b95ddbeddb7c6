"""Where the weights of a model are: in memory, offloaded by Accelerate, or in a folder that is read part by part."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.offloading import is_hooked, onloaded
from hf_mcsmoe.layers.streaming import Run

__all__ = ["Folder", "InMemory", "Offloaded", "Run", "Source", "source_of"]

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Source(Protocol):
    """A model and access to its weights."""

    @property
    def model(self) -> PreTrainedModel:
        """The model; its weights may be elsewhere."""

    def loaded(self, path: str) -> AbstractContextManager[nn.Module]:
        """Yield the module at `path` of `model`, with its weights there for the time of the block."""

    def streamed(self) -> AbstractContextManager[Run]:
        """Let `model(**batch)` find its weights for the time of the block.

        Yields what runs several batches together, so that each part of the model is loaded once for all of them:
        `outputs = run(lambda batch: model(**batch), batches)`.
        """


def _one_by_one(forward: Callable[[T], R], batches: Iterable[T]) -> list[R]:
    return [forward(batch) for batch in batches]


class InMemory:
    """A model whose weights are all there."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model. Without weights, on the meta device, it can be looked at, and nothing else."""
        self.model = model

    @contextlib.contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """Yield the module.

        Raises:
            ValueError: it stands on the meta device, without weights.
        """
        module = self.model.get_submodule(path)
        self._check_present(module)
        yield module

    @contextlib.contextmanager
    def streamed(self) -> Iterator[Run]:
        """Yield what runs batches one after the other.

        Raises:
            ValueError: part of the model stands on the meta device, without weights.
        """
        self._check_present(self.model)
        yield _one_by_one

    def _check_present(self, module: nn.Module) -> None:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"{type(self.model).__name__} holds no weights, it stands on the meta device. Load the model, or pass "
                "`Folder(path)`, which reads them from the checkpoint as they are needed."
            )


class Offloaded:
    """A model whose weights Accelerate keeps elsewhere, and brings in for each forward of a module by itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model that was loaded or dispatched with a device map, or offloaded."""
        self.model = model

    @contextlib.contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """Yield the module with its weights, on the CPU where they were offloaded."""
        module = self.model.get_submodule(path)
        with onloaded(module):
            yield module

    @contextlib.contextmanager
    def streamed(self) -> Iterator[Run]:
        """Yield what runs batches one after the other."""
        yield _one_by_one


# What is put around a model, by the name of its class, and how the model is got out of it.
WRAPPERS = {
    "PeftModel": "call its merge_and_unload(), which adds the adapters to the weights, and pass what that returns",
    "OptimizedModule": "pass the model that was compiled, its `_orig_mod`, and compile the result",
    "DataParallel": "pass its `module`",
    "DistributedDataParallel": "pass its `module`",
}


def source_of(origin: "PreTrainedModel | str | os.PathLike | Source") -> Source:
    """Return the source of a model, of a checkpoint's folder, or what is a source already.

    Raises:
        ValueError: see `Folder`; or a module that is no model of Transformers, such as one that is put around it.
        TypeError: none of these.
    """
    if isinstance(origin, str | os.PathLike):
        return Folder(origin)
    if isinstance(origin, PreTrainedModel):
        return Offloaded(origin) if is_hooked(origin) else InMemory(origin)
    if isinstance(origin, nn.Module):
        raise ValueError(_no_model(origin))
    if not isinstance(origin, Source):
        raise TypeError(f"model must be a model of Transformers or the folder of one, not {type(origin).__name__}.")
    return origin


def _no_model(module: nn.Module) -> str:
    names = {kind.__name__ for kind in type(module).__mro__}
    advice = next((advice for name, advice in WRAPPERS.items() if name in names), "pass a PreTrainedModel")
    return (
        f"{type(module).__name__} has no Mixture-of-Experts layer that could be found, since it is no model of "
        f"Transformers itself: {advice}."
    )
