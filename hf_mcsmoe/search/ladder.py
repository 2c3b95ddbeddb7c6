"""What a model would be at several sizes, before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.search.choices import (
    Chosen,
    choose,
    fixed_bytes,
    measured_singles,
    single_methods,
    smallest_bytes,
    whole_bytes,
)
from hf_mcsmoe.search.config import SizeConfig

# Sizes that are told, as shares of the source.
SHARES = (0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.075, 0.05)


@dataclass(frozen=True)
class Rung:
    """One size: what is done for it, and the effect that is predicted, in nats; None without curves."""

    method: str
    chosen: Chosen
    effect: float | None


def size_ladder(
    layers: Layers, curves: Mapping[str, LayerCurves], search: SizeConfig, source: int, skip: Sequence[str] = ()
) -> list[Rung]:
    """Return what is chosen for shares of `source` bytes that can be reached, the largest first, by the curves.

    The smallest that can be reached is the last.
    """
    least, whole = smallest_bytes(layers, search, skip), fixed_bytes(layers, skip) + whole_bytes(layers, skip)
    limits = [int(share * source) for share in SHARES]
    chosen = [choose(layers, curves, search, limit, skip) for limit in limits if least < limit < whole]
    chosen.append(choose(layers, curves, search, least, skip))
    return [Rung("chosen", item, sum(item.predicted.values())) for item in chosen]


def predicted_ladder(
    layers: Layers, curves: Mapping[str, LayerCurves], search: SizeConfig, source: int, skip: Sequence[str] = ()
) -> list[Rung]:
    """Return what `size_ladder` does and, beside it, the single methods, with the effect of each."""
    singles = measured_singles(layers, curves, search, skip)
    alone = [Rung(name, item, sum(item.predicted.values())) for name, item in singles.items()]
    return [*size_ladder(layers, curves, search, source, skip), *alone]


def method_sizes(layers: Layers, search: SizeConfig, skip: Sequence[str] = ()) -> list[Rung]:
    """Return the sizes of single methods, the largest first, from shapes alone."""
    found = single_methods(layers, search, skip)
    return sorted((Rung(name, item, None) for name, item in found.items()), key=lambda rung: -rung.chosen.bytes)
