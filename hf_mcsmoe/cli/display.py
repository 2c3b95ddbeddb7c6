"""What the commands print: progress bars and tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from hf_mcsmoe.evaluation.costs import Account, cost_rows
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.plan import MergePlan

console = Console()


class Advance:
    """Moves one progress bar, batch by batch or layer by layer."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        """Add a bar of `total` steps."""
        self.progress = progress
        self.task = progress.add_task(description, total=total)

    def __call__(self, items: list[Any]) -> Iterator[Any]:
        """Yield the items; each is a step once it is done with."""
        self.to(0, len(items))
        for done, item in enumerate(items, start=1):
            yield item
            self.to(done, len(items))

    def layer(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` layers are done."""
        self.to(done, total)

    def to(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done."""
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """Show a progress bar for the time of the block."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield Advance(progress, description, total)


_NAME = Column("layer", overflow="fold")


def layer_table(layers: Layers) -> Table:
    """Return the sizes of layers of experts, a row each."""
    table = Table(_NAME, "experts", "top-k", "d", "width", "parameters", box=None)
    for layer in layers:
        sizes = (layer.num_experts, layer.top_k or "?", layer.hidden_size, layer.intermediate_size)
        table.add_row(layer.name, *map(str, sizes), f"{layer.num_parameters:,}")
    return table


def plan_table(plan: MergePlan) -> Table:
    """Return the experts of each layer before and after a merge, and the tokens that it was planned on."""
    table = Table(_NAME, "experts before", "after", "tokens", box=None)
    for name, layer in plan.layers.items():
        counts = (len(layer.expert_map), len(layer.dominant), plan.provenance["tokens"][name])
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def cost_table(accounts: Mapping[str, Account]) -> Table:
    """Return the costs of a model in its stages, a column each."""
    head, *rows = cost_rows(accounts)
    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    return table
