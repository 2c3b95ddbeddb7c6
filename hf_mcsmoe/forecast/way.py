"""Which way a compression goes: with the whole model in memory, or streamed from folder to folder."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_mcsmoe.forecast.needs import Needs
from hf_mcsmoe.search.size import bytes_text

NO_WAY = "does not fit"


@dataclass(frozen=True)
class Way:
    """The way that is taken, `IN_MEMORY` or `STREAMED` (see `needs`) or `NO_WAY`, and why, as a sentence."""

    name: str
    reason: str


def way_for(needs: Mapping[str, Needs], memory: int, disk: int | None = None) -> Way:
    """Return the first way that fits.

    Args:
        needs: of the ways that it can go, the fastest first.
        memory: bytes that there are, what the process holds already included.
        disk: bytes that are free where the result goes; None where nobody knows.
    """
    for name in needs:
        if disk is not None and needs[name].disk > disk:
            told = f"the result takes {bytes_text(needs[name].disk)} on disk, of which {bytes_text(disk)} are free"
            return Way(NO_WAY, told)
        if needs[name].needed <= memory:
            return Way(name, f"{bytes_text(needs[name].needed)} of the {bytes_text(memory)} of memory that there are")
    name, least = list(needs.items())[-1]
    phase = least.phases[least.peak]
    most = max((part for part in phase if part != "process"), key=lambda part: phase[part])
    return Way(
        NO_WAY,
        f"{name} it takes {bytes_text(least.needed)} of memory, of which there are {bytes_text(memory)}; most is "
        f"{most} ({bytes_text(phase[most])}) while {least.peak}",
    )
