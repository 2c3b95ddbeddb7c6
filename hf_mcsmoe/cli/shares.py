"""`--data FILE:0.3`: names of data with their shares of the samples that are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from hf_mcsmoe.data.text import Sample


@dataclass(frozen=True)
class Shared:
    """The samples of one data, and their share of what is drawn; None for what the others leave."""

    name: str
    share: float | None
    samples: list[Sample]


def parsed(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """Return the names of data with their shares, None where there is none.

    A path that is there is a path, whatever it looks like, and what follows a Hub id may be its configuration.

    Raises:
        ValueError: something behind a file's name that is no share, or shares that leave nothing for the others.
    """
    pairs = [_parsed(item) for item in data]
    shares = [share for _, share in pairs]
    given = [share for share in shares if share is not None]
    if given and len(given) < len(shares) and sum(given) >= 1:
        raise ValueError(f"--data {' --data '.join(data)}: the shares leave nothing for the data without one.")
    return pairs


def _parsed(item: str) -> tuple[str, float | None]:
    name, _, tail = item.rpartition(":")
    if not name or Path(item).exists():
        return item, None
    try:
        share = float(tail)
    except ValueError:
        share = -1.0
    if 0 < share <= 1:
        return name, share
    if Path(name).is_file():
        raise ValueError(f"--data {item}: {tail!r} is no share of the samples, above 0 and up to 1 ({name}:0.3).")
    return item, None


def counts_of(shares: Sequence[float | None], number: int) -> list[int]:
    """Return how many of a number of samples each share is.

    Shares without a value are what the others leave of 1, in equal parts; then all are scaled to add up to 1.
    """
    given = [share for share in shares if share is not None]
    rest = (1 - sum(given)) / max(len(shares) - len(given), 1)
    values = [rest if share is None else share for share in shares]
    edges = [round(number * value / sum(values)) for value in accumulate(values, initial=0.0)]
    return [stop - start for start, stop in pairwise(edges)]
