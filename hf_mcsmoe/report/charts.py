"""Drawings of layers, a row each, and of points: from plain numbers to SVG."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from hf_mcsmoe.report.svg import (
    LEVELS,
    WIDTH,
    Box,
    boxes,
    ceiling,
    coloured,
    dots,
    drawing,
    level,
    line,
    polyline,
    scale,
    text,
)
from hf_mcsmoe.report.words import cut

# Units that a letter of a label takes at most.
LETTER = 5.4
# Cells of this width and rows of this height hold a number.
NUMBERED = (12.5, 14.0)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a drawing lie: labels at the left, rows thinner the more there are."""

    labels: Sequence[str]
    top: float = 20.0
    right: float = WIDTH

    @property
    def pitch(self) -> float:
        """From one row to the next."""
        return min(max(480 / max(len(self.labels), 1), 8.0), 24.0)

    @property
    def height(self) -> float:
        """Of what is drawn in a row."""
        return self.pitch - (6 if self.pitch > 14 else 2)

    @property
    def bottom(self) -> float:
        """Where the last row ends."""
        return self.top + self.pitch * len(self.labels)

    @cached_property
    def shown(self) -> list[str]:
        """The labels, cut to a third of the width."""
        return [cut(label, int(WIDTH / 3 / LETTER)) for label in self.labels]

    @property
    def left(self) -> float:
        """Where the rows begin."""
        return max((len(label) for label in self.shown), default=0) * LETTER + 8

    def y(self, row: int) -> float:
        """Return the upper edge of a row."""
        return self.top + row * self.pitch

    def names(self) -> Iterator[Markup]:
        """Yield the labels, as many as do not touch."""
        every = math.ceil(12 / self.pitch)
        for row in range(0, len(self.shown), every):
            yield text(self.left - 6, self.y(row) + self.height / 2 + 3, self.shown[row], "label", "end")


def paired_bars(
    title: str,
    labels: Sequence[str],
    pairs: Sequence[tuple[float | None, float | None]],
    show: Callable[[float], str],
    names: tuple[str, str] = ("before", "after"),
) -> Markup:
    """Return bars before, and in them bars after, a row each, on one scale from zero."""
    rows = Rows(labels, top=34, right=WIDTH - 44)
    top = ceiling(max((value for pair in pairs for value in pair if value is not None), default=0))
    unit = (rows.right - rows.left) / top
    parts = [*_legend(names), *_axis(rows, top, show)]
    for place, css in ((0, "before"), (1, "after")):
        inset = place * rows.height / 4
        bars = [
            (rows.left, rows.y(row) + inset, max(value * unit, 0.5), rows.height - 2 * inset)
            for row, pair in enumerate(pairs)
            if (value := pair[place]) is not None
        ]
        parts.append(boxes(bars, css))
    if rows.pitch > 14:
        parts += [
            text(WIDTH, rows.y(row) + rows.height / 2 + 3, f"{after / before - 1:+.0%}", "small", "end")
            for row, (before, after) in enumerate(pairs)
            if before and after is not None
        ]
    return drawing(title, rows.bottom, [*parts, *rows.names()])


def bars(title: str, labels: Sequence[str], values: Sequence[float], show: Callable[[float], str]) -> Markup:
    """Return bars with their values, a row each, on one scale from zero."""
    rows = Rows(labels, top=24, right=WIDTH - 44)
    top = ceiling(max(values, default=0))
    unit = (rows.right - rows.left) / top
    lengths = [max(value * unit, 0.5) for value in values]
    drawn = boxes(((rows.left, rows.y(row), long, rows.height) for row, long in enumerate(lengths)), "after")
    told = [
        text(rows.left + long + 5, rows.y(row) + rows.height / 2 + 3, show(value), "small")
        for row, (long, value) in enumerate(zip(lengths, values, strict=True))
    ]
    return drawing(title, rows.bottom, [*_axis(rows, top, show), drawn, *told, *rows.names()])


def _legend(names: tuple[str, str]) -> list[Markup]:
    second = 14 + len(names[0]) * LETTER + 14
    return [
        boxes([(0, 2, 9, 9)], "before"),
        text(14, 10, names[0], "small"),
        boxes([(second, 2, 9, 9)], "after"),
        text(second + 14, 10, names[1], "small"),
    ]


def _axis(rows: Rows, top: float, show: Callable[[float], str]) -> Iterator[Markup]:
    for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = rows.left + part * (rows.right - rows.left)
        yield line(x, rows.top - 4, x, rows.bottom, "grid")
        yield text(x, rows.top - 8, show(part * top), "small", anchor)


@dataclass(frozen=True)
class Cell:
    """One cell of a row: what is written in it, its value, and whether it is marked."""

    name: str
    value: float | None
    is_marked: bool = False


def cell_rows(
    title: str, labels: Sequence[str], groups: Sequence[Sequence[Sequence[Cell]]], low: float, high: float
) -> Markup:
    """Return rows of groups of cells, coloured from `low` to `high`; a gap parts the groups."""
    rows = Rows(labels, top=22)
    parts = [scale(2, f"{low:.2g}", f"{high:.2g}")]
    for row, found in enumerate(groups):
        parts.append(_cells(rows, row, found, low, high))
    return drawing(title, rows.bottom, [*parts, *rows.names()])


def _cells(rows: Rows, row: int, groups: Sequence[Sequence[Cell]], low: float, high: float) -> Markup:
    """Return one row: a cell of a group touches the next."""
    count = sum(map(len, groups))
    gap = min(6.0, 0.3 * (rows.right - rows.left) / max(len(groups), 1))
    width = (rows.right - rows.left - gap * (len(groups) - 1)) / max(count, 1)
    x, y, drawn = rows.left, rows.y(row), []
    for group in groups:
        for cell in group:
            drawn.append(((x, y, width, rows.height), cell))
            x += width
        x += gap
    fills = coloured((box, level(cell.value, low, high)) for box, cell in drawn)
    return fills + _marks(drawn, low, high)


def _marks(drawn: Sequence[tuple[Box, Cell]], low: float, high: float) -> Markup:
    """Return the marks of cells and, where there is room, what is written in them."""
    if not drawn:
        return Markup("")
    _, _, width, height = drawn[0][0]
    marked = [box for box, cell in drawn if cell.is_marked]
    if width < NUMBERED[0] or height < NUMBERED[1]:
        thick = min(3.0, height / 3)
        return boxes(((x, y + height - thick, width, thick) for x, y, _, _ in marked), "line")
    numbers = [
        text(x + width / 2, y + height / 2 + 3, cell.name, f"cell {_ink(level(cell.value, low, high))}", "middle")
        for (x, y, _, _), cell in drawn
    ]
    outlines = boxes(((x + 1, y + 1, width - 2, height - 2) for x, y, _, _ in marked), "outline")
    return outlines + Markup("").join(numbers)


def _ink(step: int | None) -> str:
    """Return the class of letters that are read on a step of the scale of colours."""
    return "ink" if step is None or step <= LEVELS // 2 else "paper"


@dataclass(frozen=True)
class Part:
    """One part of a row that is filled by shares: how much of it, its class, and what is written in it."""

    share: float
    css: str
    name: str = ""


def share_rows(
    title: str, labels: Sequence[str], groups: Sequence[Sequence[Sequence[Part]]], names: Sequence[tuple[str, str]]
) -> Markup:
    """Return rows filled by the shares of the parts of groups; a gap parts the groups.

    Args:
        names: classes and what they mean, for the legend.
    """
    rows = Rows(labels, top=22)
    parts, x = [], 0.0
    for css, name in names:
        parts += [boxes([(x, 2, 9, 9)], css), text(x + 14, 10, name, "small")]
        x += 14 + len(name) * LETTER + 12
    for row, found in enumerate(groups):
        parts.append(_shares(rows, row, found))
    return drawing(title, rows.bottom, [*parts, *rows.names()])


def _shares(rows: Rows, row: int, groups: Sequence[Sequence[Part]]) -> Markup:
    gap = min(2.0, 0.2 * (rows.right - rows.left) / max(len(groups), 1))
    room = rows.right - rows.left - gap * (len(groups) - 1)
    x, by_class, names = rows.left, {}, []  # type: float, dict[str, list[Box]], list[Markup]
    for group in groups:
        start = x
        for part in group:
            width = part.share * room
            by_class.setdefault(part.css, []).append((x, rows.y(row), max(width - 0.6, 0.0), rows.height))
            x += width
        name = group[0].name if group else ""
        if rows.height >= NUMBERED[1] and group and group[0].share * room > LETTER * len(name) + 3:
            names.append(text(start + 2.5, rows.y(row) + rows.height / 2 + 3, name, "cell paper"))
        x += gap
    return Markup("").join([*(boxes(found, css) for css, found in by_class.items()), *names])


def square(title: str, values: Sequence[Sequence[float]], marked: Sequence[float], low: float, high: float) -> Markup:
    """Return a square of values, neighbours of one colour as one rectangle, with dots on its diagonal.

    Args:
        marked: places of the dots, from 0 to the number of rows.
    """
    cell = WIDTH / max(len(values), 1)
    items = (item for row, line_of in enumerate(values) for item in _runs(line_of, row * cell, cell, low, high))
    centres = [((place + 0.5) * cell, (place + 0.5) * cell) for place in marked]
    return drawing(title, WIDTH, [coloured(items), dots(centres, max(min(cell / 4, 12.0), 2.0), "mark")])


def _runs(values: Sequence[float], y: float, cell: float, low: float, high: float) -> Iterator[tuple[Box, int | None]]:
    steps, start = [level(value, low, high) for value in values], 0
    for end in range(1, len(steps) + 1):
        if end == len(steps) or steps[end] != steps[start]:
            yield (start * cell, y, (end - start) * cell, cell), steps[start]
            start = end


@dataclass(frozen=True)
class Point:
    """A result in the plane: what it takes, what it loses, and its number in the table."""

    x: float
    y: float
    name: str


def scatter(
    title: str,
    points: Sequence[Point],
    shows: tuple[Callable[[float], str], Callable[[float], str]],
    axes: tuple[str, str],
    *,
    in_decades: bool = False,
) -> Markup:
    """Return points on two axes from zero, with a line through those that no other point beats.

    Args:
        in_decades: whether the upper axis has a step for each power of ten, for positive values.
    """
    left, top, right, bottom = 44.0, 24.0, WIDTH - 12.0, 230.0
    most_x = ceiling(max(point.x for point in points))
    heights, ticks = (_decades if in_decades else _from_zero)([point.y for point in points])
    places = [
        (left + point.x / most_x * (right - left), bottom - height * (bottom - top))
        for point, height in zip(points, heights, strict=True)
    ]
    parts = [text(0, 10, axes[1], "small"), text(right, bottom + 32, axes[0], "small", "end")]
    for part, value in ticks:
        y = bottom - part * (bottom - top)
        parts += [line(left, y, right, y, "grid"), text(left - 5, y + 3, shows[1](value), "small", "end")]
    for part in (0.0, 0.5, 1.0):
        x, anchor = left + part * (right - left), "end" if part == 1 else "middle"
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 14, shows[0](part * most_x), "small", anchor)]
    best = unbeaten(points)
    parts.append(polyline([places[number] for number in best], "front"))
    parts += [dots([places[number] for number in best], 8, "point best")]
    parts += [dots([place for number, place in enumerate(places) if number not in best], 8, "point")]
    parts += [text(x, y + 3, point.name, "cell paper", "middle") for (x, y), point in zip(places, points, strict=True)]
    return drawing(title, bottom + 38, parts)


def _from_zero(values: Sequence[float]) -> tuple[list[float], list[tuple[float, float]]]:
    """Return the shares of an axis from zero that values take, and its ticks with their values."""
    most = ceiling(max(values))
    return [value / most for value in values], [(part, part * most) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]


def _decades(values: Sequence[float]) -> tuple[list[float], list[tuple[float, float]]]:
    """Return the same of an axis whose steps are powers of ten."""
    powers = [math.log10(value) for value in values]
    low = math.floor(min(powers))
    steps = max(math.ceil(max(powers)) - low, 1)
    ticks = [(step / steps, 10.0 ** (low + step)) for step in range(steps + 1)]
    return [(power - low) / steps for power in powers], ticks


def unbeaten(points: Sequence[Point]) -> list[int]:
    """Return the numbers of the points than which none takes no more and loses less, by what they take."""
    order = sorted(range(len(points)), key=lambda number: (points[number].x, points[number].y))
    best, least = [], math.inf
    for number in order:
        if points[number].y < least:
            best.append(number)
            least = points[number].y
    return best
