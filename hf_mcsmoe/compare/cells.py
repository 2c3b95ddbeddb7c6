"""One cell of a comparison: a method at a level, on one draw of the calibration text; JSON in and out."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from hf_mcsmoe.search.size import parse_size

# The two ways to say how small a result is to be.
EXPERTS, SIZE = "experts", "size"


@dataclass(frozen=True)
class Level:
    """How small a result is to be: a share or a number of `experts`, or the `size` of its weight files.

    Raises:
        ValueError: it is neither.
    """

    kind: str
    value: int | float | str

    def __post_init__(self) -> None:
        if self.kind == SIZE:
            parse_size(self.value)
            return
        is_number = type(self.value) is int and self.experts > 0
        if not is_number and not (type(self.value) is float and 0 < self.experts <= 1):
            raise ValueError(
                f"experts={self.value!r} must be a whole number of experts a layer (8) or a share in (0, 1] (0.5)."
            )

    @property
    def experts(self) -> int | float:
        """The number or share of experts."""
        return cast(int | float, self.value)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


@dataclass(frozen=True)
class Figures:
    """What a result is worth on one text, in nats per position: `kl` to the original, and `loss`."""

    kl: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Cell:
    """What one method gave at one level, from one draw (`seed`) of the calibration text.

    `done` says in words what became of the experts; `bytes` are those of the tensors that would be saved, of the
    original as well, without the files' headers; `asked` those that a size stands for, with headers; `seconds` and
    `memory` (bytes, the peak of the process) what making it took, without the statistics, which all methods of a draw
    share. `texts` tells by the name of a text what the result is worth there, `layers` the squared error of each
    layer's output over the squared output, at inputs of the original model that are held out; `metrics` are figures of
    a task. A cell that could not be made has an `error` and nothing else; `notes` are warnings.
    """

    method: str
    level: str
    seed: int
    done: str = ""
    parameters: int | None = None
    bytes: int | None = None
    asked: int | None = None
    seconds: float | None = None
    memory: int | None = None
    texts: dict[str, Figures] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What the cell is found by."""
        return self.method, self.level, self.seed

    @property
    def is_finite(self) -> bool:
        """Whether no figure is NaN or infinite."""
        worth = [value for figures in self.texts.values() for value in (figures.kl, figures.loss)]
        return all(math.isfinite(value) for value in [*worth, *self.layers.values()] if value is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as JSON values; what is empty is left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", {}, [])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cell":
        """Return what `to_dict` gave.

        Raises:
            KeyError, TypeError: it is no cell.
        """
        texts = {name: Figures(**figures) for name, figures in values.get("texts", {}).items()}
        return cls(**{**values, "texts": texts})


@dataclass(frozen=True)
class Row:
    """Cells of one method at one level, of all `draws` as their mean; `spread` is the deviation of the first KL."""

    cell: Cell
    draws: int
    spread: float | None = None


def rows_of(cells: Iterable[Cell]) -> list[Row]:
    """Return the cells of each method and level as one row, in the order in which they first come."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.level), []).append(cell)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Cell]) -> Row:
    made = [cell for cell in group if not cell.error]
    if not made:
        return Row(group[0], 0)
    first = made[0]
    texts = {name: _mean_figures([cell.texts[name] for cell in made]) for name in first.texts}
    mean = replace(
        first,
        texts=texts,
        layers={name: statistics.fmean(cell.layers[name] for cell in made) for name in first.layers},
        metrics={
            name: statistics.fmean(cell.metrics[name] for cell in made if name in cell.metrics)
            for name in first.metrics
        },
        seconds=_mean([cell.seconds for cell in made]),
        memory=max((cell.memory for cell in made if cell.memory is not None), default=None),
        parameters=_whole([cell.parameters for cell in made]),
        bytes=_whole([cell.bytes for cell in made]),
    )
    known = [cell.texts[name].kl for cell in made for name in [*cell.texts][:1]]
    values = [value for value in known if value is not None]
    return Row(mean, len(made), statistics.stdev(values) if len(values) > 1 else None)


def _mean_figures(values: Sequence[Figures]) -> Figures:
    return Figures(_mean([item.kl for item in values]), _mean([item.loss for item in values]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _whole(values: Sequence[int | None]) -> int | None:
    mean = _mean(values)
    return None if mean is None else round(mean)
