"""What parts of a choice cost a layer, as it was measured: a curve over experts, and one over the bits of each matrix.

The squared errors of a layer's output that a reduction, the rounding of W_in and that of W_out leave add up, and so do
their effects on the model. Factors of low rank are measured as they are rounded: they hold more in fewer weights.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_mcsmoe.methods.choice import REDUCTIONS, Choice, Grid

# Exponents of the curve beyond what was measured stay between these: errors grow at least with the experts removed.
STEEPNESS = (1.0, 6.0)


@dataclass(frozen=True)
class Part:
    """What one part of a choice costs: `error`, squared, of the layer's output per token, and `effect` in nats.

    `elsewhere` is the error on tokens of another kind than those that it was fitted to, where there were any.
    """

    error: float
    effect: float
    elsewhere: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "elsewhere" and value is None:
                continue
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number from 0 on")


@dataclass(frozen=True)
class LayerCurves:
    """The curves of one layer of `experts` E.

    `reduced` by reduction and experts G, fitted, in the dtype they had; `w_in` and `w_out` of all experts by grid;
    `low_rank` of all experts by rank and then by the bits of both matrices' factors, fitted; 0 bits: as they are.
    """

    experts: int
    reduced: dict[str, dict[int, Part]] = field(default_factory=dict)
    w_in: dict[Grid, Part] = field(default_factory=dict)
    w_out: dict[Grid, Part] = field(default_factory=dict)
    low_rank: dict[int, dict[int, Part]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := self.reduced.keys() - set(REDUCTIONS):
            raise ValueError(f"the reduction {min(unknown)!r} is none of {', '.join(REDUCTIONS)}")
        for parts in self.reduced.values():
            if not all(0 < experts < self.experts for experts in parts):
                raise ValueError(f"experts={sorted(parts)} must be fewer than {self.experts}")

    def effect(self, choice: Choice) -> float:
        """Return the effect of a choice on the model, in nats per position.

        Raises:
            ValueError: it was not measured.
        """
        total = self.reduction_effect(choice.reduce, choice.experts)
        if choice.rank is not None:
            return total + self._low_rank_effect(choice)
        for name, grid in (("w_in", choice.w_in), ("w_out", choice.w_out)):
            if grid is not None and grid not in vars(self)[name]:
                raise ValueError(f"{name}={grid} was not measured: collect the curves anew.")
            total += 0.0 if grid is None else vars(self)[name][grid].effect
        return total

    def _low_rank_effect(self, choice: Choice) -> float:
        bits = {grid.bits if grid else 0 for grid in (choice.w_in, choice.w_out)}
        known = self.low_rank.get(choice.rank or 0, {})
        if len(bits) > 1 or not bits <= known.keys():
            told = "/".join(map(str, sorted(bits)))
            raise ValueError(f"rank={choice.rank} at {told} bits was not measured: collect the curves anew.")
        return known[bits.pop()].effect

    def reduction_effect(self, reduce: str, experts: int) -> float:
        """Return the effect of fewer experts alone: as measured, or on a power of the experts that are gone.

        Raises:
            ValueError: nothing was measured of this reduction.
        """
        if experts >= self.experts:
            return 0.0
        points = [(self.experts - count, part.effect) for count, part in self.reduced.get(reduce, {}).items()]
        if not points:
            raise ValueError(f"reduce={reduce!r} was not measured: collect the curves anew.")
        return _between(sorted(points), self.experts - experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the curves as JSON values."""
        grids = {
            name: [asdict(grid) | asdict(part) for grid, part in vars(self)[name].items()]
            for name in ("w_in", "w_out")
        }
        reduced = {
            name: {str(experts): asdict(part) for experts, part in parts.items()}
            for name, parts in self.reduced.items()
        }
        low_rank = {
            str(rank): {str(bits): asdict(part) for bits, part in parts.items()}
            for rank, parts in self.low_rank.items()
        }
        return {"experts": self.experts, "reduced": reduced, **grids, "low_rank": low_rank}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerCurves":
        """Return the curves that `to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError: they are damaged.
        """
        reduced = {
            name: {int(experts): Part(**part) for experts, part in parts.items()}
            for name, parts in values["reduced"].items()
        }
        grids = {name: dict(map(_grid_part, values[name])) for name in ("w_in", "w_out")}
        low_rank = {
            int(rank): {int(bits): Part(**part) for bits, part in parts.items()}
            for rank, parts in values.get("low_rank", {}).items()
        }
        return cls(values["experts"], reduced, **grids, low_rank=low_rank)


def _grid_part(entry: Mapping[str, Any]) -> tuple[Grid, Part]:
    parts = {name: value for name, value in entry.items() if name in Part.__dataclass_fields__}
    return Grid(**{name: value for name, value in entry.items() if name not in parts}), Part(**parts)


def _between(points: list[tuple[int, float]], gone: int) -> float:
    """Return the value at `gone` on straight lines through points in logarithms, never falling; beyond, extended."""
    places = [math.log(place) for place, _ in points]
    values = list(itertools.accumulate((math.log(max(value, 1e-12)) for _, value in points), max))
    place = math.log(gone)
    if len(points) == 1:
        return math.exp(values[0] + 2 * (place - places[0]))
    last = next((number for number, known in enumerate(places) if known >= place), len(places) - 1)
    first, last = (last - 1, last) if last else (0, 1)
    slope = (values[last] - values[first]) / (places[last] - places[first])
    if not places[first] <= place <= places[last]:
        slope = min(max(slope, STEEPNESS[0]), STEEPNESS[1])
    nearest = first if place < places[first] or slope == 0 else last
    return math.exp(values[nearest] + slope * (place - places[nearest]))
