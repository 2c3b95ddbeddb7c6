"""What is compared, on which draws of the calibration text, and whether it can be, before any forward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from hf_mcsmoe.calibration.gradients import check_loss
from hf_mcsmoe.calibration.reference import check_reference, reference_norms
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compare.cells import EXPERTS, SIZE, Level
from hf_mcsmoe.compare.memory import measured_by
from hf_mcsmoe.compare.ways import Task, Way, task_of, ways_of
from hf_mcsmoe.data.batches import digest
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.record import public_name

# One batch of so many is held out of what the methods read, for those that choose among results.
HELD_OUT = 8
BY_BLOCKS = "; one block in memory"


@dataclass(frozen=True)
class Grid:
    """What is compared: methods, each at so many experts and at sizes, perhaps all in few bits.

    `methods` are names, or keyword arguments of `compress` by names of one's own; see `ways_of`. `experts` are shares
    or numbers, `sizes` bytes (20GB) or shares of the source's weight files. `base_model` is the checkpoint that the
    model was trained from, for methods that compare with it.

    Raises:
        ValueError: an unknown method, a level that is none, or no level at all.
    """

    methods: Sequence[str] | Mapping[str, Mapping[str, Any]]
    experts: Sequence[int | float] = ()
    sizes: Sequence[str | float] = ()
    bits: int | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("There is nothing to compare at: give numbers or shares of experts, or sizes.")
        _ = self.ways

    @property
    def levels(self) -> list[Level]:
        """How small results are to be."""
        given = [(EXPERTS, value) for value in self.experts] + [(SIZE, value) for value in self.sizes]
        # 1 is an expert a layer, 1.0 all of them, and the two are equal.
        return list({str(level): level for level in (Level(kind, value) for kind, value in given)}.values())

    @property
    def ways(self) -> list[Way]:
        """The methods."""
        return ways_of(self.methods, self.bits)


@dataclass
class Draw:
    """One draw of the calibration text: batches that methods read, and those held out for methods that choose."""

    seed: int
    fitted: Sequence[Batch]
    held_out: Sequence[Batch]
    statistics: RoutingStatistics | None = None

    @classmethod
    def of(cls, seed: int, batches: "Sequence[Batch] | Draw") -> "Draw":
        """Part the batches, unless they are parted already: the last eighth is held out, of at least two one."""
        if isinstance(batches, Draw):
            return batches
        number = max(len(batches) // HELD_OUT, 1) if len(batches) > 1 else 0
        place = len(batches) - number
        return cls(seed, batches[:place], batches[place:])


def norms_of(layers: Layers, grid: Grid, tasks: Sequence[Task]) -> dict[str, torch.Tensor] | None:
    """Return the norms of the reference checkpoint's routers, where a method reads them.

    Raises:
        ValueError: a checkpoint is named, and no method reads it.
    """
    reads = any(set(task.way.needs) - set(of_data(task.way.needs)) for task in tasks)
    if grid.base_model and not reads:
        raise ValueError(
            f"base_model={grid.base_model!r} is for methods that compare with it, as router-norm does, and none of "
            "these reads it: leave it out."
        )
    return dict(reference_norms(layers, grid.base_model)) if grid.base_model else None


def conditions_of(
    layers: Layers, draws: Mapping[int, Draw], texts: Mapping[str, Sequence[Batch]], grid: Grid
) -> dict[str, Any]:
    """Return what the figures of cells depend on, as JSON values."""
    return {
        "model": public_name(layers.model.name_or_path),
        "fingerprint": layers.fingerprint,
        "dtype": str(layers.model.dtype).removeprefix("torch."),
        "bits": grid.bits,
        **({"base_model": public_name(grid.base_model)} if grid.base_model else {}),
        "texts": {name: digest(batches) for name, batches in texts.items()},
        "draws": {str(seed): digest([*draw.fitted, *draw.held_out]) for seed, draw in draws.items()},
        "methods": {way.name: way.told() for way in grid.ways},
        "memory": measured_by(layers.model.device) + (BY_BLOCKS if isinstance(layers.source, Folder) else ""),
        "versions": {name: version(name) for name in ("hf_mcsmoe", "transformers", "torch")},
    }


def planned(
    layers: Layers, grid: Grid, held: RoutingStatistics | None = None, *, by_blocks: bool = False
) -> tuple[list[Task], list[tuple[Way, Level, str]]]:
    """Return the cells that can be made, and those that cannot with the reason, before any forward.

    Args:
        held: statistics of an earlier pass.
        by_blocks: whether the model is read block by block, of which not all can be made.

    Raises:
        ValueError: none can be made.
    """
    tasks, refused = [], []
    for level in grid.levels:
        for way in grid.ways:
            try:
                if grid.base_model is None:
                    check_reference(way.needs, None, held)
                check_loss(layers.model, way.needs)
                task = task_of(layers, way, level)
                if by_blocks:
                    check_blocks(layers)
                tasks.append(task)
            except ValueError as error:
                refused.append((way, level, sentence_of(error)))
    if not tasks:
        way, level, sentence = refused[0]
        raise ValueError(f"No method can be tried on this model. {way.name} at {level}: {sentence}")
    return tasks, refused


def sentence_of(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check_given(
    layers: Layers, draws: Mapping[int, Any], texts: Mapping[str, Any], statistics: RoutingStatistics | None
) -> None:
    if not draws or not all(draw.fitted if isinstance(draw, Draw) else draw for draw in draws.values()):
        raise ValueError("There is no calibration text: give at least one batch for each draw.")
    if empty := [name for name, batches in texts.items() if not batches]:
        raise ValueError(f"The text {empty[0]} has no rows to judge on.")
    if not texts:
        raise ValueError("There is no text to judge on: give at least one.")
    if statistics is not None and statistics.fingerprint != layers.fingerprint:
        raise ValueError("The statistics were taken from another model; collect them on this one.")
    if statistics is not None and len(draws) > 1:
        raise ValueError(f"The statistics are of one draw of the calibration text, and there are {len(draws)}.")


def check_statistics(statistics: RoutingStatistics | None, tasks: Sequence[Task]) -> None:
    for task in tasks if statistics is not None else ():
        for sums in statistics.layers.values():  # type: ignore[union-attr]
            sums.check(of_data(task.way.needs))
