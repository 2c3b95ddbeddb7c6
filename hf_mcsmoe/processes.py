"""Several processes that work together, each on its part: a launcher starts them, `together` lets them meet.

All of them run the same program on the same arguments. What is split among them (batches, experts) comes together
again in all, so that each ends with the same result and the first one writes it. Values are exchanged on the CPU.
"""

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# Seconds that a process waits for the others to take part, between two looks at whether the first is done, and that
# the first stays for the others to look, or to tell what it tells as well.
PATIENCE, POLL, GOODBYE, MOMENT = 1800.0, 0.2, 60.0, 5.0
_MEETINGS = count()


@dataclass(frozen=True)
class Processes:
    """The processes that work together: which of them this one is, from 0 on, and how many there are."""

    rank: int = 0
    size: int = 1
    group: Any = None
    store: Any = None
    # Of what the first makes while the others wait; all count alike.
    _numbers: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this one writes and tells."""
        return self.rank == 0

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Yield this process's share of the items, of which all processes have the same."""
        return islice(items, self.rank, None, self.size)

    def joined(self, own: Sequence[T]) -> list[T]:
        """Return what all processes made of their shares, see `own`, in the order of the items."""
        if self.size == 1:
            return list(own)
        parts = self.gathered(own)
        return [parts[number % self.size][number // self.size] for number in range(sum(map(len, parts)))]

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        return [self.sent(value, rank) for rank in range(self.size)]

    def agreed(self, make: Callable[[], T]) -> T:
        """Return what the first process makes."""
        box: Any = make() if self.is_first else None
        return self.sent(box, 0)

    def added(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor of one shape and dtype over all processes."""
        total = tensor.detach().cpu().clone()
        if self.size > 1:
            self._exchange(lambda: dist.all_reduce(total, group=self.group))
        return total

    def tells(self, message: str) -> bool:
        """Return whether this process is the first to tell a message, which several may have to.

        What they ask is held by the first of all, which waits a moment for the others that may have the same to tell.
        """
        if self.store is None:
            return True
        with contextlib.suppress(RuntimeError):  # the store went with the process that held it
            asked = self.store.add(f"told {message}", 1)
            if self.is_first:
                self._wait_for(f"told {message}", self.size, MOMENT)
            return asked == 1
        return True

    def counted(self, key: str, more: int = 0) -> int:
        """Return what several processes have added to a number that a key tells, after adding so many more.

        Raises:
            RuntimeError: the process that keeps the numbers ended; with what others said last.
        """
        try:
            return self.store.add(f"counted {key}", more)
        except RuntimeError as error:
            raise RuntimeError(self._told_by_others(error)) from None

    def sent(self, value: T, source: int) -> T:
        """Return the value of one process in all of them."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        self._exchange(lambda: dist.broadcast_object_list(box, group_src=source, group=self.group))
        return box[0]

    def _exchange(self, exchange: Callable[[], Any]) -> None:
        """Exchange something.

        Raises:
            RuntimeError: another process ended or does not answer; with what it said last.
        """
        try:
            exchange()
        except RuntimeError as error:
            raise RuntimeError(self._told_by_others(error)) from None

    def _told_by_others(self, error: RuntimeError) -> str:
        others = [rank for rank in range(self.size) if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            for rank in others:
                if self.store.check([f"failed {rank}"]):
                    reason = self.store.get(f"failed {rank}").decode()
                    return f"Process {rank} of {self.size} (from 0 on) failed, so the others end as well: {reason}"
        is_late = "imed out" in str(error) or "imeout" in str(error)
        what = "did not answer in time" if is_late else "ended without a word (it was killed, or out of memory)"
        return (
            f"Another of the {self.size} processes {what}: what was still to be written is missing; start all of them "
            "again."
        )

    def led(self, make: Callable[[], T]) -> T:
        """Return what the first process makes while the others wait, as long as it takes.

        Raises:
            RuntimeError: the first process failed.
        """
        if self.size == 1:
            return make()
        value: Any = None
        key = f"led {next(self._numbers)}"
        if self.is_first:
            with working_as(ALONE):
                value = make()
            self.store.add(key, 1)
        else:
            self._await(key)
        return self.sent(value, 0)

    def _await(self, key: str) -> None:
        """Wait until the first process has set a key in the store.

        Raises:
            RuntimeError: it failed.
        """
        try:
            while not self.store.check([key]):
                if self.store.check(["failed 0"]):
                    raise RuntimeError("failed")
                time.sleep(POLL)
        except RuntimeError as error:
            raise RuntimeError(self._told_by_others(error)) from None

    def finish(self) -> None:
        """Wait, as long as it takes, until the first process is done; that waits a while until the others know.

        Raises:
            RuntimeError: the first process failed.
        """
        if self.size == 1:
            return
        if not self.is_first:
            self._await("done")
            try:
                self.store.add("left", 1)
            except RuntimeError as error:
                raise RuntimeError(self._told_by_others(error)) from None
            return
        with contextlib.suppress(RuntimeError):  # what it made is complete, whatever becomes of the others
            self.store.set("done", "1")
            self._wait_for("left", self.size - 1, GOODBYE)

    def _wait_for(self, key: str, number: int, seconds: float) -> None:
        """Wait until so many were added to a key of the store, or for so long."""
        begin = time.monotonic()
        while self.store.add(key, 0) < number and time.monotonic() - begin < seconds:
            time.sleep(POLL)


ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("hf_mcsmoe_processes", default=ALONE)


def current() -> Processes:
    """Return the processes that this one works together with: within `together` those, else itself alone."""
    return _CURRENT.get()


@contextlib.contextmanager
def working_as(processes: Processes) -> Iterator[None]:
    """Let this process work as one of these for the time of the block, or, as `ALONE`, by itself."""
    token = _CURRENT.set(processes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def started() -> int:
    """Return how many processes a launcher (torchrun, accelerate launch) has started, or 1.

    Raises:
        ValueError: the variable in which launchers tell it is no number.
    """
    told = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not told.isdecimal() or int(told) < 1:
        raise ValueError(
            f"WORLD_SIZE={told!r} in the environment is no number of processes: start with torchrun or accelerate "
            "launch, which set it, or unset it."
        )
    return int(told)


@contextlib.contextmanager
def together(patience: float = PATIENCE) -> Iterator[Processes]:
    """Let the processes that `torchrun` or `accelerate launch` started work together for the time of the block.

    Each runs the block with the same model and the same batches: `collect_statistics` runs a share of the batches in
    each, a merge aligns and a repair fits a share of the experts, and all end with the same result. The first writes:
    `with together() as processes: ...; if processes.is_first: model.save_pretrained(folder)`. Without a launcher the
    one process does all of it.

    Args:
        patience: seconds that a process waits for the others to take part in what they do together. For the first one
            to come to the end of the block, which may write for hours, they wait as long as it takes.

    Raises:
        ValueError: see `started`; or a launcher's other variables are missing.
        RuntimeError: another process failed, ended, or did not answer in time; the message tells why, if that did.
    """
    if started() == 1 and not dist.is_initialized():
        yield ALONE
        return
    processes = _met(patience)
    try:
        with working_as(processes):
            yield processes
        processes.finish()
    except BaseException as error:
        reason = error.__cause__ or error  # of an exit, why
        with contextlib.suppress(RuntimeError):
            processes.store.set(f"failed {processes.rank}", " ".join(str(reason).split()) or type(reason).__name__)
        raise


def _met(patience: float) -> Processes:
    """Let the processes meet, unless somebody had them meet before; they stay together until the interpreter ends.

    Those that met and left at once might else meet again where some have not left yet.
    """
    if not dist.is_initialized():
        if lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE={started()} in the environment, and no {lacking[0]}: start with torchrun or accelerate "
                "launch, which set both, or unset WORLD_SIZE."
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=timedelta(seconds=patience))
        atexit.register(_leave)
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
    store = dist.PrefixStore(f"hf_mcsmoe {next(_MEETINGS)}", dist.distributed_c10d._get_default_store())
    return Processes(dist.get_rank(), dist.get_world_size(), group, store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
