"""Forwards of several batches that take turns at each block of a model, so that a block is loaded once for all."""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

T = TypeVar("T")
R = TypeVar("R")
THREAD = "hf_mcsmoe forward"
BACK = " back"
CURRENT: contextvars.ContextVar["Forward | None"] = contextvars.ContextVar("hf_mcsmoe_forward", default=None)


class Run(Protocol):
    """Runs a forward over batches, as `map` does."""

    def __call__(self, forward: Callable[[T], R], batches: Iterable[T], /) -> list[R]:
        """Return `forward(batch)` for each of the batches, in their order."""


def blocks(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """Return a model's blocks by path: the entries of every `ModuleList` that is not inside another."""
    found = {}
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            found[where] = child
        else:
            found |= blocks(child, where)
    return found


def back(path: str) -> str:
    """Return the name of the place at which forwards wait for a block on their way back."""
    return f"{path}{BACK}"


def way_of(paths: Iterable[str]) -> list[str]:
    """Return where forwards that go back wait: at each of some blocks, and at each in reverse."""
    there = list(paths)
    return [*there, *map(back, reversed(there))]


@dataclass(frozen=True)
class Turn:
    """Whose turn it is at a block: the forwards whose key `chosen` takes.

    With `peeks` they run the block on what they bring, for those who watch its modules, and wait before it again.
    """

    chosen: Callable[[Any], bool]
    peeks: bool = False


class Turnstile:
    """Loads a block when a forward reaches it, and frees it when all forwards that wait there have passed.

    Each forward of `run` has a thread of its own and runs until it reaches a block, where it waits. When all wait, the
    first of these blocks is loaded, and the forwards that wait there go on to their next block, one after the other:
    only one thread ever runs. No signature is rebuilt and no mask recomputed, and hooks see what they always see.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], loaded: Callable[[str], AbstractContextManager[object]]
    ) -> None:
        """Take the blocks by path, in the order in which they are to pass, and what holds the weights of a path."""
        self.blocks = dict(blocks)
        self.loaded = loaded
        self._alone: list[tuple[str, contextlib.ExitStack]] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let all forwards of the blocks load and free their weights for the time of the block."""
        handles = []
        try:
            for path, block in self.blocks.items():
                enter = partial(self._enter, path)
                handles.append(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                handles.append(block.register_forward_hook(partial(self._leave, path), always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            while self._alone:  # of a forward that was interrupted
                self._alone.pop()[1].close()

    def run(self, forward: Callable[[T], R], batches: Iterable[T]) -> list[R]:
        """Return `forward(batch)` for each batch, as `map` does, with all of them under way at once.

        Each runs in a copy of the caller's context (`contextvars`) and in its gradient and autocast mode.

        Raises:
            Whatever a forward raises; the others are then given up.
        """
        forwards = [Forward(partial(forward, batch)) for batch in batches]

        def turns(path: str) -> Iterator[Turn]:
            with self.loaded(path):
                yield Turn(lambda key: True)

        run_in_turns(forwards, way_of(self.blocks), turns)
        return [one.result for one in forwards]

    def _enter(self, path: str, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        current = CURRENT.get()
        if current is not None and path in current.passed:
            return
        if current is not None and current.inside is None:
            while current.wait(path):
                module.forward(*arguments, **keywords)
                current.inside = None
            return
        # A forward outside `run`, or a block that another block calls.
        stack = contextlib.ExitStack()
        self._alone.append((path, stack))
        stack.enter_context(self.loaded(path))

    def _leave(self, path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        current = CURRENT.get()
        if self._alone and self._alone[-1][0] == path:
            self._alone.pop()[1].close()
        elif current is not None:
            current.inside = None


def run_in_turns(forwards: Sequence["Forward"], order: Sequence[str], turns: Callable[[str], Iterator[Turn]]) -> None:
    """Run forwards side by side, block after block, in the turns that `turns(path)` gives at each of them.

    Args:
        forwards: of one model or of several whose blocks have the same paths.
        order: the blocks' paths, in the order in which they are to pass.
        turns: holds what a block needs until it ends; all that wait there must have passed by then.

    Raises:
        Whatever a forward raises; the others are then given up.
    """
    places = {path: number for number, path in enumerate(order)}
    try:
        for one in forwards:
            one.resume()
        while waiting := [one.block for one in forwards if one.block is not None]:
            path = min(waiting, key=places.__getitem__)
            with contextlib.closing(cast(Generator, turns(path))) as given:
                for turn in given:
                    for one in forwards:
                        if one.block == path and turn.chosen(one.key):
                            one.resume(peeks=turn.peeks)
    finally:
        for one in forwards:
            one.give_up()


def wait_for(place: str) -> None:
    """Let the forward that runs in this thread stop at a place until it is its turn there."""
    current = CURRENT.get()
    if current is None:
        raise RuntimeError(f"No forward that takes turns reached {place}.")
    current.wait(place)


def current_key() -> Any:
    """Return the key of the forward that runs in this thread; None where it is none of `run_in_turns`."""
    current = CURRENT.get()
    return None if current is None else current.key


def has_passed(path: str) -> bool:
    """Tell whether the forward that runs in this thread had passed a block before it began."""
    current = CURRENT.get()
    return current is not None and path in current.passed


def is_between_blocks() -> bool:
    """Tell whether the forward that runs in this thread is in none of its blocks."""
    current = CURRENT.get()
    return current is not None and current.inside is None


class _GivenUp(BaseException):
    """Ends the thread of a forward that nobody waits for any more."""


class Forward:
    """A forward in a thread of its own that runs only while another thread is in `resume`."""

    def __init__(self, call: Callable[[], Any], key: Hashable = None, passed: Collection[str] = ()) -> None:
        """Take what is to be called, by what it is told from others, and blocks at which it does not wait."""
        self.key, self.passed = key, passed
        self.block: str | None = None  # at which it waits
        self.inside: str | None = None  # the block that it passes
        self.result: Any = None
        self._error: BaseException | None = None
        self._given_up = self._peeks = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        run = partial(contextvars.copy_context().run, self._run, call, _modes())
        self._thread = threading.Thread(target=run, name=THREAD, daemon=True)

    def resume(self, *, peeks: bool = False) -> None:
        """Let it run until it waits at its next block or ends; raises what it raised. See `Turn` for `peeks`."""
        self._peeks = peeks
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """End it where it waits."""
        self._given_up = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()

    def wait(self, block: str) -> bool:
        """Stop at a block until it is resumed; called by its own thread. Returns whether it only peeks."""
        self.block = block
        self._stopped.release()
        self._go.acquire()
        if self._given_up:
            raise _GivenUp
        self.block, self.inside = None, block
        return self._peeks

    def _run(self, call: Callable[[], Any], modes: list[AbstractContextManager[object]]) -> None:
        CURRENT.set(self)
        try:
            with contextlib.ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                self.result = call()
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.block = None
            self._stopped.release()


def _modes() -> list[AbstractContextManager[object]]:
    """Return the calling thread's modes of Torch, to be entered in another thread, which starts without them."""
    modes: list[AbstractContextManager[object]] = [torch.inference_mode(torch.is_inference_mode_enabled())]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            modes.append(torch.autocast(device, torch.get_autocast_dtype(device)))
    # Last, since entering inference mode, on or off, sets the gradient mode as well.
    return [*modes, torch.set_grad_enabled(torch.is_grad_enabled())]
