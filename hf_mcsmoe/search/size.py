"""The size that a result is to have: bytes of its weight files, or a share of those of the source."""

import math
import re

# Bytes of the units that a size is given in.
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Units of which somebody may think, by what they are in bytes.
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
WAYS = "give bytes, as 20GB, 800MB or 12345678B (GB = 10^9 bytes), or a share of the source above 0 and below 1"


def parse_size(size: str | float) -> int | float:
    """Return a size as whole bytes, or as a share in (0, 1) of the source's weight files.

    Args:
        size: text, a number and a unit of `UNITS`, or a number without unit for a share; or the share itself.

    Raises:
        ValueError: it is neither.
    """
    number, unit = _split(size)
    if not unit:
        if 0 < number < 1:
            return number
        advice = f"; for {number:.0f} bytes write {number:.0f}B" if number > 1 else ""
        raise ValueError(f"size={size!r} is no share between 0 and 1 and has no unit: {WAYS}{advice}.")
    if unit not in UNITS:
        raise ValueError(f"size={size!r} is in no known unit: {_advice(number, unit)}.")
    if not number * UNITS[unit] >= 1:
        raise ValueError(f"size={size!r} is less than one byte: {WAYS}.")
    return math.floor(number * UNITS[unit])


def bytes_of(size: str | float, source_bytes: int) -> int:
    """Return the bytes that a size stands for, given those of the source's weight files.

    Raises:
        ValueError: it is no size, or not smaller than the source, so that nothing is to be done.
    """
    parsed = parse_size(size)
    if isinstance(parsed, float):
        return math.floor(parsed * source_bytes)
    if parsed >= source_bytes:
        raise ValueError(
            f"size={size!r} is not below the {bytes_text(source_bytes)} that the model has already: nothing is to be "
            "done. Ask for less, or use the model as it is."
        )
    return parsed


def bytes_text(count: float) -> str:
    """Return bytes as a reader likes them, with the digits that tell two sizes apart: 12.35 MB."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if count >= UNITS[unit]), "B")
    return f"{count / UNITS[unit]:.4g} {unit}" if unit != "B" else f"{count:.0f} B"


def _split(size: str | float) -> tuple[float, str]:
    """Return the number of a size and its unit, "" for none.

    Raises:
        ValueError: it does not begin with a plain number.
    """
    if type(size) is float:
        return size, ""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z%]*)\s*", size) if isinstance(size, str) else None
    if found is None:
        raise ValueError(f"size={size!r} is no size: {WAYS}.")
    return float(found[1]), found[2]


def _advice(number: float, unit: str) -> str:
    """Return what to write in place of a unit that is none of ours."""
    if unit == "%" and 0 < number < 100:
        return f"write {number / 100:g}"
    close = {name.lower(): name for name in [*UNITS, *BINARY] if name != "KB"}.get(unit.lower())
    if close in BINARY:
        return f"write {bytes_text(number * BINARY[close]).replace(' ', '')} (GB = 10^9 bytes)"
    return f"write {number:g}{close}" if close else WAYS
