"""Pieces of SVG: pure functions from numbers to markup. What they draw is coloured by the page's classes."""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

# Units across every drawing: about the pixels that a phone has for it, so that letters are as large as they say.
WIDTH = 320
# Steps of the scale of colours, classes q0 to q8.
LEVELS = 9
# Where an axis may end, but for a power of ten: halves and quarters of these are short numbers.
STEPS = (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10)

Box = tuple[float, float, float, float]


def number(value: float) -> str:
    """Return a coordinate in as few characters as a tenth of a unit takes."""
    return f"{value:.1f}".removesuffix(".0")


def drawing(title: str, height: float, parts: Iterable[Markup]) -> Markup:
    """Return a drawing as wide as what it is in, read out as `title`."""
    opening = f'<svg viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{opening}<title>{escape(title)}</title>{''.join(parts)}</svg>")


def text(x: float, y: float, content: object, css: str = "", anchor: str = "start") -> Markup:
    """Return a line of text whose baseline is at `y`."""
    place = f'<text x="{number(x)}" y="{number(y)}" class="{css}" text-anchor="{anchor}">'
    return Markup(f"{place}{escape(content)}</text>")


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """Return a line."""
    return Markup(f'<path class="{css}" d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"/>')


def polyline(points: Sequence[tuple[float, float]], css: str) -> Markup:
    """Return a line through points."""
    return Markup(f'<path class="{css}" d="M{"L".join(f"{number(x)} {number(y)}" for x, y in points)}"/>')


def boxes(items: Iterable[Box], css: str) -> Markup:
    """Return rectangles (x, y, width, height) of one class; one shape however many they are."""
    path = "".join(
        f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h{number(-width)}z" for x, y, width, height in items
    )
    return Markup(f'<path class="{css}" d="{path}"/>' if path else "")


def dots(points: Iterable[tuple[float, float]], radius: float, css: str) -> Markup:
    """Return discs of one class: strokes without a length and with round ends."""
    path = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
    return Markup(f'<path class="{css}" stroke-width="{number(2 * radius)}" d="{path}"/>' if path else "")


def coloured(items: Iterable[tuple[Box, int | None]]) -> Markup:
    """Return rectangles by their step of the scale of colours; None has a class of its own."""
    by_level: dict[int | None, list[Box]] = {}
    for box, level in items:
        by_level.setdefault(level, []).append(box)
    return Markup("").join(
        boxes(found, "unknown" if level is None else f"q{level}") for level, found in by_level.items()
    )


def level(value: float | None, low: float, high: float) -> int | None:
    """Return the step of the scale of colours from `low` to `high`, 0 to 8; None for no value."""
    if value is None or not math.isfinite(value):
        return None
    share = 0.5 if high <= low else (value - low) / (high - low)
    return min(max(int(share * LEVELS), 0), LEVELS - 1)


def scale(y: float, low: str, high: str) -> Markup:
    """Return the scale of colours between its two ends, 16 units high, at the right end of the line."""
    width, right = 11.0, WIDTH - 6.5 * len(high) - 6
    left = right - LEVELS * width
    swatches = coloured(((left + step * width, y, width, 9.0), step) for step in range(LEVELS))
    return text(left - 5, y + 8, low, "small", "end") + swatches + text(right + 5, y + 8, high, "small")


def ceiling(value: float) -> float:
    """Return the least of `STEPS` times a power of ten that is not below `value`; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in STEPS if step * power >= value * (1 - 1e-9))
