"""Sums that are added to those of an earlier pass over the same data: only what is lacking is summed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import digest
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.statistics import with_tokens
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.progress import Progress, counted, silent

# Sums by which the same data are known again: which experts the tokens reached.
KNOWN_BY = ("tokens", "counts")


def lacking(statistics: RoutingStatistics | None, needs: Iterable[str]) -> list[str]:
    """Return the statistics among `needs` that were not collected of some layer; without statistics all."""
    layers = [] if statistics is None else list(statistics.layers.values())
    return [name for name in with_tokens(needs) if not layers or any(name not in sums for sums in layers)]


def extended(
    layers: Layers,
    batches: Sequence[Batch],
    held: RoutingStatistics | None,
    needs: Iterable[str],
    progress: Progress = silent,
    place: Path | None = None,
) -> RoutingStatistics:
    """Return statistics with all of `needs`: those that are held, and from one more pass what these lack.

    Args:
        held: of an earlier pass; with what choices cost, which stays. Where they do not tell of which data they are,
            one more pass tells.
        progress: called as `progress("statistics", batches done, batches)`.
        place: see `collect_statistics`.

    Raises:
        ValueError: those that are held are of another model, or of other data; see `collect_statistics` as well.
    """
    names, data = lacking(held, needs), digest(batches)
    if held is None:
        fresh = collect_statistics(layers, counted(batches, "statistics", progress), names, place=place)
        return replace(fresh, data=data)
    if held.fingerprint != layers.fingerprint or held.layers.keys() != set(layers.names):
        raise ValueError("The statistics were taken from another model; collect them on this one.")
    if held.data and held.data != data:
        raise ValueError(
            "The statistics were taken from other data (another text, or other rows of it): collect all of them anew."
        )
    if not names and held.data:
        return held
    fresh = collect_statistics(layers, counted(batches, "statistics", progress), [*names, *KNOWN_BY], place=place)
    for layer, sums in held.layers.items():
        if other := [name for name in KNOWN_BY if name in sums and not sums[name].equal(fresh[layer][name])]:
            raise ValueError(
                f"The statistics were taken from other data ({other[0]} of {layer} differ), and none of these can be "
                "added to them: collect all of them anew."
            )
    joined = {layer: Sums({**fresh[layer], **sums}) for layer, sums in held.layers.items()}
    return replace(held, layers=joined, data=data)
