"""The turnstile, on small modules of the test's own: who runs when, what is loaded then, and how it ends."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import torch
from torch import nn

from hf_mcsmoe.layers.streaming import THREAD, Turnstile, blocks


class Block(nn.Module):
    """Tells the log who passes, and that it is loaded then."""

    def __init__(self, number: int, log: list[tuple[str, int]], held: set[str]) -> None:
        super().__init__()
        self.number, self.log, self.held = number, log, held

    def forward(self, value: int) -> int:
        assert f"layers.{self.number}" in self.held, "not loaded"
        self.log.append((f"layers.{self.number}", value % 100))
        return value + 100


class Model(nn.Module):
    """Blocks in a row, of which a batch may leave some out."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []
        self.held: set[str] = set()
        self.most = 0
        self.layers = nn.ModuleList(Block(number, self.log, self.held) for number in range(count))

    def forward(self, value: int, without: tuple[int, ...] = (), fail_at: int | None = None) -> int:
        for number, block in enumerate(self.layers):
            if number == fail_at:
                raise KeyError(f"batch {value % 100} fails")
            if number not in without:
                value = block(value)
        return value

    @contextlib.contextmanager
    def loaded(self, path: str) -> Iterator[None]:
        self.log.append(("load", int(path[-1])))
        self.held.add(path)
        self.most = max(self.most, len(self.held))
        try:
            yield
        finally:
            self.held.remove(path)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture
def model() -> Model:
    return Model(3)


@pytest.fixture
def turnstile(model: Model) -> Iterator[Turnstile]:
    turnstile = Turnstile(blocks(model), model.loaded)
    with turnstile.installed():
        yield turnstile
    assert not model.held
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.layers)
    assert not _threads()


def test_each_block_is_loaded_once_and_all_batches_pass_it_in_order(model: Model, turnstile: Turnstile) -> None:
    assert turnstile.run(model, iter([1, 2, 3])) == [301, 302, 303]
    each = [[("load", number), *((f"layers.{number}", batch) for batch in (1, 2, 3))] for number in range(3)]
    assert model.log == list(chain(*each))
    assert model.most == 1


@pytest.mark.parametrize("skipped", [[(), (1,)], [(0,), (1,)], [(0, 1, 2), ()], [(2,), (0, 1)]])
def test_batches_that_reach_different_blocks_end_and_load_each_block_once(
    model: Model, turnstile: Turnstile, skipped: list[tuple[int, ...]]
) -> None:
    results = turnstile.run(lambda item: model(item, without=skipped[item]), range(2))
    assert results == [item + 100 * (3 - len(skipped[item])) for item in range(2)]
    assert [number for what, number in model.log if what == "load"] == [0, 1, 2]


def test_no_batches_and_a_forward_that_reaches_no_block(model: Model, turnstile: Turnstile) -> None:
    assert turnstile.run(model, []) == []
    assert turnstile.run(lambda item: item + 1, [1, 2]) == [2, 3]
    assert not model.log


def test_a_plain_forward_loads_and_frees_by_itself(model: Model, turnstile: Turnstile) -> None:
    assert model(5) == 305
    assert model.log == list(chain(*([("load", number), (f"layers.{number}", 5)] for number in range(3))))
    assert model.most == 1


@pytest.mark.parametrize("number", range(3))
def test_what_a_batch_raises_reaches_the_caller_and_all_is_freed(
    model: Model, turnstile: Turnstile, number: int
) -> None:
    with pytest.raises(KeyError, match="batch 2 fails"):
        turnstile.run(lambda item: model(item, fail_at=number if item == 2 else None), [1, 2, 3])
    assert not model.held
    assert not _threads()
    assert turnstile.run(model, [1, 2]) == [301, 302]


def test_what_a_block_raises_frees_it_in_a_plain_forward_too(model: Model, turnstile: Turnstile) -> None:
    def fail(module: nn.Module, arguments: tuple) -> None:
        raise KeyError("hook")

    with contextlib.closing(_Removing(model.layers[1].register_forward_pre_hook(fail))):
        for call in (lambda: model(1), lambda: turnstile.run(model, [1, 2])):
            with pytest.raises(KeyError, match="hook"):
                call()
            assert not model.held
    assert model(1) == 301


class _Removing:
    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self.close = handle.remove


def test_weights_that_cannot_be_read_end_the_run(model: Model) -> None:
    @contextlib.contextmanager
    def loaded(path: str) -> Iterator[None]:
        if path == "layers.1":
            raise OSError("disk")
        with model.loaded(path):
            yield

    turnstile = Turnstile(blocks(model), loaded)
    with turnstile.installed(), pytest.raises(OSError, match="disk"):
        turnstile.run(model, [1, 2])
    assert not model.held
    assert not _threads()


def _in_autocast(call: Callable[[], object]) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


@pytest.mark.parametrize(
    "within",
    [torch.no_grad(), torch.enable_grad(), torch.inference_mode(), _in_autocast],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast"],
)
def test_threads_run_in_the_callers_modes(turnstile: Turnstile, within: Callable) -> None:
    def modes(_: int = 0) -> tuple:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    if within is _in_autocast:
        here, there = _in_autocast(modes), _in_autocast(lambda: turnstile.run(modes, [1]))
    else:
        with within:
            here, there = modes(), turnstile.run(modes, [1])
    assert there == [here]


def test_a_block_that_calls_another_keeps_its_own_weights(model: Model, turnstile: Turnstile) -> None:
    outer, inner = model.layers[1], model.layers[2]
    # Held elsewhere, not registered: as a layer holds a block that several layers share.
    vars(outer)["forward"] = lambda value: Block.forward(outer, inner(value))
    assert turnstile.run(model, [1, 2]) == [401, 402]
    assert model.most == 2


def test_blocks_are_the_entries_of_outer_lists_in_order() -> None:
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])})
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])])
    model = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"block": nn.ModuleList([nn.Sequential(inner)])}), "stages": nested}
    )
    assert list(blocks(model)) == ["encoder.block.0", "stages.0.0", "stages.0.1"]
    assert all(model.get_submodule(path) is block for path, block in blocks(model).items())
