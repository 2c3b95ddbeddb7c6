"""What was seen of the parts of a choice, and the curves that follow when the effects of the trials are known."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.methods.choice import Grid

# Exponents between which the effect grows with the error, where it was measured twice.
POWERS = (0.4, 1.3)
# The exponent at errors smaller than any that was measured: to second order a divergence is quadratic in the change.
SMALL = 1.0


@dataclass(frozen=True)
class Observed:
    """One part of a choice in place: its held-out error and, where the probe tried it, the error there and the trial.

    What a trial does to the model may be known only later, and is kept by the trial's number.
    """

    error: float
    probed: tuple[float, int] | None = None


@dataclass(frozen=True)
class Observations:
    """What was seen of a layer of `experts` E, by the keys of its `LayerCurves`; so many layers have `shared` them."""

    experts: int
    shared: int
    reduced: dict[str, dict[int, Observed]]
    w_in: dict[Grid, Observed]
    w_out: dict[Grid, Observed]
    low_rank: dict[int, dict[int, Observed]]

    def curves(self, effects: Mapping[int, float]) -> LayerCurves:
        """Return the curves.

        Args:
            effects: what each trial did to the model, in nats, by its number.
        """

        def parts(seen: Mapping[Any, Observed]) -> dict[Any, Part]:
            return _parts(seen, {number: effect * self.shared for number, effect in effects.items()})

        reduced = {reduce: parts(seen) for reduce, seen in self.reduced.items()}
        low_rank = {rank: parts(seen) for rank, seen in self.low_rank.items()}
        return LayerCurves(self.experts, reduced, parts(self.w_in), parts(self.w_out), low_rank)

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON values."""
        grids = {
            name: [[asdict(grid), *_entry(seen)] for grid, seen in vars(self)[name].items()]
            for name in ("w_in", "w_out")
        }
        others = {
            name: [[key, [[count, *_entry(seen)] for count, seen in part.items()]] for key, part in own.items()]
            for name, own in (("reduced", self.reduced), ("low_rank", self.low_rank))
        }
        return {"experts": self.experts, "shared": self.shared, **grids, **others}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Observations":
        """Return what `to_dict` gave."""
        grids: dict[str, Any] = {
            name: {Grid(**grid): _observed(*entry) for grid, *entry in values[name]} for name in ("w_in", "w_out")
        }
        others: dict[str, Any] = {
            name: {key: {count: _observed(*entry) for count, *entry in part} for key, part in values[name]}
            for name in ("reduced", "low_rank")
        }
        return cls(values["experts"], values["shared"], **grids, **others)


def _entry(seen: Observed) -> list[Any]:
    return [seen.error, None if seen.probed is None else list(seen.probed)]


def _observed(error: float, probed: Sequence[Any] | None) -> Observed:
    return Observed(error, None if probed is None else (probed[0], probed[1]))


def _parts(seen: Mapping[Any, Observed], effects: Mapping[int, float]) -> dict[Any, Part]:
    """Return the effect of each part, on a power of its error through those that the probe has measured."""
    probed = [(missed, effects[number]) for missed, number in (x.probed for x in seen.values() if x.probed)]
    points = sorted(point for point in probed if min(point) > 0)
    return {key: Part(item.error, _effect(points, item.error)) for key, item in seen.items()}


def _effect(points: Sequence[tuple[float, float]], error: float) -> float:
    """Return the effect of an error, given pairs of both; the nearest two decide."""
    if not points or error <= 0:
        return 0.0
    values = torch.tensor(points, dtype=torch.float64).log()
    place = torch.tensor(error, dtype=torch.float64).log()
    nearest = values[(values[:, 0] - place).abs().argsort(stable=True)[:2]]
    (near, effect), other = nearest[0], nearest[-1]
    slope = SMALL
    if len(nearest) > 1 and place >= values[0, 0] and not torch.isclose(near, other[0]):
        slope = float(((other[1] - effect) / (other[0] - near)).clamp(*POWERS))
    return float((effect + slope * (place - near)).exp())
