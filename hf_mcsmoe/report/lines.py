"""Several methods against each other: a line each through its results, named at its end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hf_mcsmoe.report.svg import WIDTH, dots, drawing, line, polyline, text
from hf_mcsmoe.report.words import cut

# Units that a letter of a name takes at most, letters of a name, and units from one name to the next.
LETTER, LONGEST, PITCH = 5.2, 17, 10.5
# Colours of the page, classes c0 to c7; further lines have them once more, with dashes.
COLOURS = 8
# What is nothing, or less by rounding, on an axis of powers of ten.
LEAST = 1e-6


@dataclass(frozen=True)
class Curve:
    """The results of one method: what each takes and what it loses, from the least on."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """Where a drawing of lines lies: bytes from `low` to `high` across, powers of ten `bottom` to `top` up."""

    low: float
    high: float
    least: int
    most: int
    height: float
    right: float
    left: float = 34.0
    upper: float = 22.0

    @classmethod
    def around(cls, curves: Sequence[Curve]) -> "Frame":
        """Return the frame that holds all points, with room for all names."""
        points = [point for curve in curves for point in curve.points]
        powers = [math.log10(max(y, LEAST)) for _, y in points]
        low, high = min(x for x, _ in points), max(x for x, _ in points)
        low, high = (low, high) if high > low else (0.9 * low, 1.1 * low)
        least = math.floor(min(powers))
        most = max(math.ceil(max(powers)), least + 1)
        width = max(len(cut(curve.name, LONGEST)) for curve in curves) * LETTER
        height = max(210.0, PITCH * len(curves))
        return cls(low, high, least, most, height, WIDTH - width - 14)

    @property
    def lower(self) -> float:
        """Where the lowest power of ten lies."""
        return self.upper + self.height

    def x(self, value: float) -> float:
        """Return the place of bytes."""
        return self.left + 6 + (value - self.low) / (self.high - self.low) * (self.right - self.left - 12)

    def y(self, value: float) -> float:
        """Return the place of a loss."""
        share = (math.log10(max(value, LEAST)) - self.least) / (self.most - self.least)
        return self.lower - share * self.height


def lines(
    title: str,
    curves: Sequence[Curve],
    colours: Sequence[int],
    shows: tuple[Callable[[float], str], Callable[[float], str]],
    axes: tuple[str, str],
) -> Markup:
    """Return lines through the results of methods; the upper axis has a step for each power of ten.

    Args:
        colours: the number of each line's colour.
        shows: how bytes and losses are written.
    """
    frame = Frame.around(curves)
    parts = [text(0, 10, axes[1], "small"), text(frame.right, frame.lower + 32, axes[0], "small", "end")]
    for power in range(frame.least, frame.most + 1):
        y = frame.y(10.0**power)
        parts += [
            line(frame.left, y, frame.right, y, "grid"),
            text(frame.left - 4, y + 3, shows[1](10.0**power), "small", "end"),
        ]
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        value = frame.low + share * (frame.high - frame.low)
        x = frame.x(value)
        parts += [
            line(x, frame.upper, x, frame.lower, "grid"),
            text(x, frame.lower + 14, shows[0](value), "small", anchor),
        ]
    for curve, colour in zip(curves, colours, strict=True):
        parts += _drawn(frame, curve, colour)
    parts += _names(frame, curves, colours)
    return drawing(title, frame.lower + 38, parts)


def _drawn(frame: Frame, curve: Curve, colour: int) -> list[Markup]:
    places = [(frame.x(x), frame.y(y)) for x, y in sorted(curve.points)]
    joined = [polyline(places, f"curve {_css(colour)}")] if len(places) > 1 else []
    return [*joined, dots(places, 2.6, f"end {_css(colour)}")]


def _names(frame: Frame, curves: Sequence[Curve], colours: Sequence[int]) -> list[Markup]:
    """Return the names beside the last points, moved apart, each with a line to its point."""
    ends = [max(curve.points) for curve in curves]
    order = sorted(range(len(curves)), key=lambda number: frame.y(ends[number][1]))
    wanted = [frame.y(ends[number][1]) for number in order]
    parts = []
    for number, y in zip(order, apart(wanted, PITCH, frame.upper + 4, frame.lower), strict=True):
        x, point = frame.x(ends[number][0]), frame.y(ends[number][1])
        css = _css(colours[number])
        parts.append(polyline([(x, point), (frame.right + 6, y)], f"lead {css}"))
        parts.append(text(frame.right + 9, y + 3, cut(curves[number].name, LONGEST), f"small name {css}"))
    return parts


def apart(places: Sequence[float], pitch: float, first: float, last: float) -> list[float]:
    """Return rising places that are at least `pitch` apart, as near as can be to those wanted, between two ends."""
    found, bound = [], first
    for place in places:
        found.append(max(place, bound))
        bound = found[-1] + pitch
    bound = last
    for number in reversed(range(len(found))):
        found[number] = min(found[number], bound)
        bound = found[number] - pitch
    return found


def _css(colour: int) -> str:
    return f"c{colour % COLOURS}" + (" dashed" if colour >= COLOURS else "")
