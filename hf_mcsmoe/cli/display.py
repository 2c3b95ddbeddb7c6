"""What the commands print: progress bars and tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.record import Costs, Quality, cost_rows, quality_rows

console = Console()


class Advance:
    """Moves one progress bar, batch by batch or layer by layer."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        """Add a bar of `total` steps."""
        self.progress = progress
        self.task = progress.add_task(description, total=total)

    def __call__(self, items: list[Any]) -> Iterator[Any]:
        """Yield the items; each is a step once it is done with."""
        self.show(0, len(items))
        for done, item in enumerate(items, start=1):
            yield item
            self.show(done, len(items))

    def show(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps are done."""
        self.progress.update(self.task, completed=done, total=total)


class Stages:
    """Shows a bar for each stage of `compress`, from when it begins."""

    def __init__(self, progress: Progress) -> None:
        """Show nothing yet."""
        self.progress = progress
        self.bars: dict[str, Advance] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        self._bar(stage).show(done, total)

    def over(self, stage: str, items: list[Any]) -> Iterator[Any]:
        """Yield the items; each is a step of the stage once it is done with."""
        return self._bar(stage)(items)

    def _bar(self, stage: str) -> Advance:
        if stage not in self.bars:
            self.bars[stage] = Advance(self.progress, stage, 1)
        return self.bars[stage]


def _bars() -> Progress:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """Show a progress bar for the time of the block."""
    with _bars() as progress:
        yield Advance(progress, description, total)


@contextmanager
def stage_bars() -> Iterator[Stages]:
    """Show the bars of stages for the time of the block."""
    with _bars() as progress:
        yield Stages(progress)


_NAME = Column("layer", overflow="fold")


def layer_table(layers: Layers) -> Table:
    """Return the sizes of layers of experts, a row each."""
    table = Table(_NAME, "experts", "top-k", "d", "width", "parameters", box=None)
    for layer in layers:
        sizes = (layer.num_experts, layer.top_k or "?", layer.hidden_size, layer.intermediate_size)
        table.add_row(layer.name, *map(str, sizes), f"{layer.num_parameters:,}")
    return table


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Return the experts of each layer before and after a merge, and the tokens that it was planned on."""
    table = Table(_NAME, "experts before", "after", "tokens", box=None)
    for name, layer in plan["layers"].items():
        counts = (len(layer["expert_map"]), len(layer["dominant"]), plan["tokens"][name])
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def quality_table(quality: Mapping[str, Quality]) -> Table:
    """Return loss and divergence of a model in its stages, a column each."""
    return _table(quality_rows(quality))


def cost_table(costs: Mapping[str, Costs]) -> Table:
    """Return the costs of a model in its stages, a column each."""
    return _table(cost_rows(costs))


def _table(rows: list[list[str]]) -> Table:
    head, *others = rows
    table = Table(*head, box=None)
    for row in others:
        table.add_row(*row)
    return table
