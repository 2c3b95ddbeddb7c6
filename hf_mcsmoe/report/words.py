"""How the page writes numbers and names."""

from collections.abc import Sequence
from itertools import zip_longest

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Return bytes in the unit that leaves one to three figures before the point; a kB is 1000 bytes."""
    if not count:
        return "0"
    step = 0
    while count >= 999.5 and step < len(UNITS) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f} {UNITS[step]}" if step == 0 else f"{count:.3g} {UNITS[step]}"


def figure(value: float | None) -> str:
    """Return a number with three figures; a hyphen for none."""
    return "-" if value is None else f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """Return a share in per cent; a hyphen where there is no whole."""
    return "-" if not whole else f"{part / whole:.0%}"


def short_names(names: Sequence[str]) -> list[str]:
    """Return labels for layers: of the parts of their names as few as tell them apart, the last dropped first."""
    columns = list(zip_longest(*(name.split(".") for name in names), fillvalue=""))
    kept = [number for number, column in enumerate(columns) if len(set(column)) > 1]
    for number in reversed(list(kept)):
        fewer = [other for other in kept if other != number]
        if len({tuple(columns[other][row] for other in fewer) for row in range(len(names))}) == len(names):
            kept = fewer
    if not kept:  # one layer: its number, where it has one
        return [next((part for part in name.split(".") if part.isdecimal()), name) for name in names]
    return [" ".join(filter(None, (columns[number][row] for number in kept))) for row in range(len(names))]


def cut(label: str, length: int) -> str:
    """Return a label of at most `length` characters; of a longer one the end, which tells more."""
    return label if len(label) <= length else f"…{label[1 - length :]}"
