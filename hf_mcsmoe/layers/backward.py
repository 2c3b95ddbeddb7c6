"""Gradients of experts after a forward: of a model in memory at once, of a folder back through block after block."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from hf_mcsmoe.layers.batches import hooks
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.layer import recorded_modules
from hf_mcsmoe.layers.nest import spooled
from hf_mcsmoe.layers.streaming import back, blocks, wait_for

Gradients = list[torch.Tensor | None]
# What lets a model, or a forward, record router logits and add a loss of them.
OUTPUT = "output_router_logits"


class Backward(Protocol):
    """How gradients come to experts."""

    def installed(self) -> contextlib.AbstractContextManager[object]:
        """Watch the forwards of a model for the time of the block."""

    def is_last(self) -> bool:
        """Tell whether gradients come to what the forward that runs in this thread shows of a layer now."""

    def run(self, loss: Callable[[], torch.Tensor], done: Callable[[], None]) -> None:
        """Make a loss and its gradients; `done` is called when experts hold theirs, by blocks once for each."""


def backward_of(layers: Layers, place: Path | None = None) -> Backward:
    """Return how gradients come to the experts of some layers.

    Args:
        place: a folder on the disk of which hidden states lie meanwhile, where a model is read block by block; None
            for memory. Those of a GPU stay there.

    Raises:
        ValueError: layers of a folder share their experts, or lie in no block.
    """
    if not isinstance(layers.source, Folder):
        return AtOnce()
    return ByBlocks(layers, Kept(place if layers.source.device.type == "cpu" else None))


class AtOnce:
    """Backward passes of a model whose weights are all there."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch nothing."""
        yield

    def is_last(self) -> bool:
        """Tell that there is one forward alone."""
        return True

    def run(self, loss: Callable[[], torch.Tensor], done: Callable[[], None]) -> None:
        """Run one backward pass."""
        loss().backward()
        done()


class Keeper(Protocol):
    """Where blocks' outputs lie until their forward has gone back through the next block."""

    @property
    def passed(self) -> Sequence[str]:
        """The blocks that forwards went back through in an earlier run."""

    def outputs(self, path: str, given: Any, said: list[Any]) -> tuple[Any, list[Any]]:
        """Return what a block gave and its routers said, both apart from any graph."""

    def gradients(self, path: str, found: Gradients) -> Gradients:
        """Return gradients of what is left, after those of a block, "" for those of the loss alone."""

    def known(self) -> Gradients:
        """Return the gradients of what is left, where some blocks were gone back through in an earlier run."""


@dataclass(frozen=True)
class Kept:
    """Keeps it for one run: mapped from the disk of a folder, or in memory."""

    place: Path | None
    passed: Sequence[str] = ()

    def outputs(self, path: str, given: Any, said: list[Any]) -> tuple[Any, list[Any]]:
        """Return it apart from any graph."""
        return apart(given) if self.place is None else spooled(given, self.place), said

    def gradients(self, path: str, found: Gradients) -> Gradients:
        """Return them."""
        return found if self.place is None else spooled(found, self.place)

    def known(self) -> Gradients:
        """Return none, for there was no earlier run."""
        return []


@dataclass
class Call:
    """A block's call in a forward: its arguments, what it gave, and what routers in it said, apart from any graph."""

    path: str
    arguments: tuple
    keywords: dict[str, Any]
    given: Any
    said: list[Any]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The tensors that came of it and that take gradients."""
        return [value for value in tree_leaves((self.given, self.said)) if _takes_gradients(value)]


class ByBlocks:
    """Backward passes of forwards that take turns at each block, see `Turnstile`, and again on the way back.

    What a block gives is cut from its graph, which is freed: the forward goes on with the same values, and gradients
    of the loss end there. Then each forward waits at its blocks in reverse order; with the block loaded it runs it
    once more, on what it was called with, and goes back through it, to what the block before gave.
    """

    def __init__(self, layers: Layers, keeper: Keeper) -> None:
        """Go back through the blocks of a model.

        Args:
            layers: of a `Folder`, whose experts take gradients.

        Raises:
            ValueError: they share their experts, or lie in no block; a loss reads what other modules say.
        """
        self.keeper, self._blocks = keeper, blocks(layers.model)
        check_blocks(layers)
        self._routers: dict[str, list[nn.Module]] = defaultdict(list)
        for layer in layers:
            path = next(path for path in self._blocks if layer.name.startswith(f"{path}."))
            self._routers[path].append(layer.router)
        self._model, routers = layers.model, {id(layer.router) for layer in layers}
        recorded = [module for path in self._blocks for module in recorded_modules(layers.model, path)]
        self._others = [module for module in recorded if id(module) not in routers]
        if self._others:  # and then routers are not listened to
            self._routers.clear()
            self._check(layers.model, (), {})
        self._own = threading.local()  # of the forward in this thread: `calls`, `said`, `depth`, `is_back`

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Keep what blocks are called with, and give, in forwards of `run`, for the time of the block.

        Others that change what a block gives are to be there before.
        """
        with hooks() as handles:
            handles.append(self._model.register_forward_pre_hook(self._check, with_kwargs=True))
            for path, block in self._blocks.items():
                handles.append(block.register_forward_pre_hook(self._enter))
                handles.append(block.register_forward_hook(partial(self._leave, path), with_kwargs=True))
                for router in self._routers[path]:
                    handles.append(router.register_forward_hook(self._say, prepend=True))
            yield

    def is_last(self) -> bool:
        """Tell whether the forward goes back."""
        return bool(self._own.is_back)

    def run(self, loss: Callable[[], torch.Tensor], done: Callable[[], None]) -> None:
        """Make a loss, and go back through the blocks that its gradients reach; `done` is called at each.

        Where an earlier run went back through some, `loss` is called for what the others were called with.
        """
        passed = self.keeper.passed
        vars(self._own).update(calls=[], said=[], depth=0, is_back=False)
        if passed:
            loss()
            self._own.calls = [call for call in self._own.calls if call.path not in passed]
            self._take(self.keeper.known())
        else:
            loss().backward()
            self._keep("")
        while self._own.calls:
            call = self._own.calls.pop()
            if call.leaves:
                wait_for(back(call.path))
                self._pass(call)
                done()
                self._keep(call.path)

    @property
    def _goes_on(self) -> bool:
        """Whether the model's forward runs in this thread."""
        return bool(vars(self._own)) and not self._own.is_back

    @property
    def _left(self) -> list[torch.Tensor]:
        return [leaf for call in self._own.calls for leaf in call.leaves]

    def _keep(self, path: str) -> None:
        self._take(self.keeper.gradients(path, [leaf.grad for leaf in self._left]))

    def _take(self, gradients: Gradients) -> None:
        for leaf, gradient in zip(self._left, gradients, strict=True):
            leaf.grad = gradient

    def _check(self, model: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Raise ValueError where the loss of a forward reads router logits of modules that are no routers."""
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        by_itself = any(getattr(model.config, OUTPUT, False) for model in models)
        asked = keywords.get(OUTPUT)
        if self._others and (by_itself if asked is None else asked):
            raise ValueError(
                f"{type(model).__name__} records what a {type(self._others[0]).__name__} says as router logits, and "
                f"the loss reads them, which is not done block by block: set {OUTPUT} to false, or load the model."
            )

    def _enter(self, *_: Any) -> None:
        if self._goes_on:
            self._own.depth += 1

    def _say(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Cut what a router says, which an auxiliary loss may read; on the way back its gradients enter there."""
        if not vars(self._own):
            return None
        said = output if self._own.is_back else apart(output)
        self._own.said.append(said)
        return said

    def _leave(self, path: str, module: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> Any:
        if not self._goes_on:
            return None
        self._own.depth -= 1
        if self._own.depth:  # a block that another calls
            return None
        given, said = self.keeper.outputs(path, output, self._own.said)
        if not self._own.said:  # of an earlier run, and others listen to the routers
            for router, value in zip(self._routers[path], said, strict=False):
                _repeat(router, value)
            said = self._own.said
        self._own.calls.append(Call(path, arguments, keywords, given, said))
        self._own.said = []
        return given

    def _pass(self, call: Call) -> None:
        """Run a block once more, and go back through it."""
        module, copies = self._blocks[call.path], dict[int, tuple[torch.Tensor, torch.Tensor]]()

        def copy(value: Any) -> Any:
            if not _takes_gradients(value):
                return value
            return copies.setdefault(id(value), (value, apart(value)))[1]

        arguments, keywords = tree_map(copy, (call.arguments, call.keywords))
        self._own.is_back, self._own.said = True, []
        # By its class: a block that an earlier run had finished gives what it gave then.
        output = type(module).forward(module, *arguments, **keywords)
        pairs = zip(tree_leaves((output, self._own.said)), tree_leaves((call.given, call.said)), strict=True)
        _back([(now, then.grad) for now, then in pairs if _takes_gradients(now)])
        self._own.said = []
        # Through what lies between blocks, as others do that read the same.
        _back([(value, taken.grad) for value, taken in copies.values()], keeps=True)


def _back(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]], *, keeps: bool = False) -> None:
    """Go back from tensors with their gradients, where there are any; `keeps` what others may go back through."""
    given = [(value, gradient) for value, gradient in pairs if gradient is not None]
    if given:
        torch.autograd.backward([one for one, _ in given], [one for _, one in given], retain_graph=keeps)


def _repeat(module: nn.Module, output: Any) -> None:
    """Let a module that is not there say what it said, to whoever listens."""
    module.forward = lambda: output
    try:
        module()
    finally:
        del module.forward


def apart(nest: Any) -> Any:
    """Return tensors, or nests of them, with the same values and without a graph, which take gradients if these do."""
    return tree_map(lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x, nest)


def _takes_gradients(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
