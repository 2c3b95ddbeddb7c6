"""What `compress` tells of its result: what became of the layers, how it does, and what it costs."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from hf_mcsmoe.cli.display import console, cost_table, layers_table, notes, quality_table
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.evaluation.costs import folder_bytes
from hf_mcsmoe.export.checkpoint import PLAIN
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.record import DROPPED, Record
from hf_mcsmoe.record import Calibration as Calibrated
from hf_mcsmoe.tables import size_lines


def calibrated(
    calibration: Calibration, batches: Sequence[Batch], held_out: Sequence[Batch], check: Sequence[Batch]
) -> Calibrated:
    """Return what the record tells of the data."""
    fitted, judging, checked = (sum(len(batch["input_ids"]) for batch in part) for part in (batches, held_out, check))
    names, others = calibration.names if batches else [], calibration.check_names if check else []
    return Calibrated(names, fitted + judging, judging, others, checked)


def finish(record: Record, output: Path, started: float) -> None:
    """Print what was done, and how long it took."""
    _show(record, output)
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")


def _show(record: Record, output: Path) -> None:
    """Print what became of the layers, how the stages do on held-out rows, and what they cost."""
    *_, last = record.costs
    costs = record.costs | {last: replace(record.costs[last], bytes_on_disk=folder_bytes(output))}
    console.print(layers_table(record.layers))
    data = record.calibration
    if record.quality:
        rows = f"{data.held_out} of {data.rows} rows"
        rows += f", and {data.check_rows} of other text ({', '.join(data.check)})," if data.check_rows else ""
        console.print(f"\nin nats per position, on {rows} that nothing was fitted to:", highlight=False)
        console.print(quality_table(record.quality))
        console.print()
    elif data.rows:
        console.print(f"{_unmeasured(data)}: neither loss nor KL to the original is known")
    console.print(cost_table(costs))
    told = [line for step in record.steps if step.title in (DROPPED, PLAIN) for line in step.lines]
    for line in [*told, *filter(None, (step.figures.get("few_rows") for step in record.steps))]:
        notes.print(escape(line), highlight=False, soft_wrap=True)
    if record.size:
        console.print()
        for line in size_lines(record.size, record.quality[record.judged].kl if record.judged else None):
            console.print(escape(line), highlight=False, soft_wrap=True)


def _unmeasured(data: Calibrated) -> str:
    if not data.held_out:
        return f"{data.rows} calibration rows are too few to hold an eighth of them out"
    return "this model tells no distribution to compare"
