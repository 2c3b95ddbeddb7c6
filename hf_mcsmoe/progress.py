"""How long work tells of where it is: one callback for all of its stages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

# Called as `progress(stage, done, total)`; the total is None while nobody knows it.
Progress = Callable[[str, int, int | None], None]
Item = TypeVar("Item")


def silent(stage: str, done: int, total: int | None) -> None:
    """Tell nobody."""


@contextmanager
def one_step(stage: str, progress: Progress) -> Iterator[None]:
    """Tell of the block as a stage of one step."""
    progress(stage, 0, 1)
    yield
    progress(stage, 1, 1)


def counted(items: Iterable[Item], stage: str, progress: Progress, *, every: int = 1) -> Iterator[Item]:
    """Yield the items, and tell of each, or of every so many, once it is done with."""
    total, done = len(items) if isinstance(items, Sequence) else None, 0
    progress(stage, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        if done % every == 0 and done != total:
            progress(stage, done, total)
    if total != 0:
        progress(stage, done, done)


def part_of(progress: Progress, before: int, total: int | None) -> Progress:
    """Return what tells of one part as of a whole: `before` steps are done already, of `total` in all."""
    return lambda stage, done, own: progress(stage, before + done, total)


def one_after_another(progress: Progress, number: int) -> Progress:
    """Return what tells of `number` parts, whose sizes are known at their ends, as of a whole."""
    before = finished = 0

    def tell(stage: str, done: int, total: int | None) -> None:
        nonlocal before, finished
        ends = done == total
        finished += ends
        progress(stage, before + done, before + done if finished == number else None)
        before += done if ends else 0

    return tell


def in_parts(stage: str, progress: Progress, number: int) -> Callable[[int, int], None]:
    """Return what tells, as `tell(done, total)`, of `number` parts of one size, one after another, as of a whole."""
    finished = 0

    def tell(done: int, total: int) -> None:
        nonlocal finished
        progress(stage, finished + done, number * total)
        finished += total if done == total else 0

    return tell
