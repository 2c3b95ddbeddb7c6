"""What the commands print: progress bars and tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.record import Costs, Quality, Stored
from hf_mcsmoe.tables import cost_rows, layer_rows, quality_rows

# The least of a name that is shown in a row, folded.
NAME = 20
# Results go to standard output, and what passes (progress, notes) to standard error.
console, notes = Console(), Console(stderr=True)


class Sheet(Table):
    """A table without lines, whose figures stay whole: where they do not fit side by side, each gets its own line."""

    def __init__(self, *heads: str) -> None:
        """Make an empty table; the names in its first column may be folded."""
        first, *others = heads
        columns = [Column(first, overflow="fold"), *(Column(head, no_wrap=True) for head in others)]
        super().__init__(*columns, box=None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table or, in a window too narrow for it, its rows one below the other."""
        cells = [[str(cell) for cell in column.cells] for column in self.columns]
        needed = [max(map(len, [str(column.header), *own])) for column, own in zip(self.columns, cells, strict=True)]
        if min(needed[0], NAME) + sum(needed[1:]) + 2 * len(needed) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        for name, *row in zip(*cells, strict=True):
            yield f"[bold]{name}[/]"
            yield from (
                f"  {column.header} {value}" for column, value in zip(self.columns[1:], row, strict=True) if value
            )


class Advance:
    """Moves one progress bar, batch by batch or layer by layer."""

    def __init__(self, progress: Progress, description: str) -> None:
        """Add a bar of a number of steps that nobody knows yet."""
        self.progress = progress
        self.task = progress.add_task(description, total=None)

    def __call__(self, items: list[Any]) -> Iterator[Any]:
        """Yield the items; each is a step once it is done with."""
        self.show(0, len(items))
        for done, item in enumerate(items, start=1):
            yield item
            self.show(done, len(items))

    def show(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps are done; while a single one is under way, only that it is."""
        self.progress.update(self.task, completed=done, total=None if (done, total) == (0, 1) else total)


class Stages:
    """Shows a bar for each stage, from when it begins: what is passed as `progress`."""

    def __init__(self, progress: Progress) -> None:
        """Show nothing yet."""
        self.progress = progress
        self.bars: dict[str, Advance] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        self.bar(stage).show(done, total)

    def bar(self, stage: str) -> Advance:
        """Return the bar of a stage, which begins now if it has not before."""
        if stage not in self.bars:
            self.bars[stage] = Advance(self.progress, stage)
        return self.bars[stage]


def passing(*columns: ProgressColumn, shown_on: Console = notes) -> Progress:
    """Return bars that vanish at their end; of what is printed meanwhile, results stay on standard output."""
    return Progress(*columns, console=shown_on, transient=True, redirect_stdout=False)


def _bars() -> Progress:
    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return passing(*columns)


def unstarted_bars() -> Progress:
    """Return bars to be shown as a part of something else."""
    return _bars()


@contextmanager
def stage_bars() -> Iterator[Stages]:
    """Show the bars of stages for the time of the block."""
    with _bars() as progress:
        yield Stages(progress)


def layer_table(layers: Layers) -> Table:
    """Return the sizes of layers of experts, a row each."""
    table = Sheet("layer", "experts", "top-k", "d", "width", "parameters")
    for layer in layers:
        sizes = (layer.num_experts, layer.top_k or "?", layer.hidden_size, layer.intermediate_size)
        table.add_row(layer.name, *map(str, sizes), f"{layer.num_parameters:,}")
    return table


def layers_table(layers: Mapping[str, Stored]) -> Table:
    """Return what became of each layer, a row each."""
    return table_of(layer_rows(layers))


def quality_table(quality: Mapping[str, Quality]) -> Table:
    """Return loss and divergence of a model in its stages, a column each."""
    return table_of(quality_rows(quality))


def cost_table(costs: Mapping[str, Costs]) -> Table:
    """Return the costs of a model in its stages, a column each."""
    return table_of(cost_rows(costs))


def table_of(rows: list[list[str]]) -> Table:
    """Return rows of text as a table; the first is the head."""
    head, *others = rows
    table = Sheet(*head)
    for row in others:
        table.add_row(*row)
    return table
