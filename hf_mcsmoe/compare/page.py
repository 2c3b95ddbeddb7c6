"""What a comparison leaves in its folder beside its cells: a table, all figures as JSON, and a page of pictures."""

import csv
import io
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from hf_mcsmoe.compare.cells import Cell, Row, rows_of
from hf_mcsmoe.compare.journal import OUTPUTS, Journal
from hf_mcsmoe.compare.pictures import failed_table, layer_pictures, method_pictures, quality_picture
from hf_mcsmoe.files import write_json, write_text
from hf_mcsmoe.report.page import TEMPLATES
from hf_mcsmoe.report.words import figure, size

FORMAT, FORMAT_VERSION = "mcsmoe-comparison", 1
# What stands for the original among the methods.
ORIGINAL = "original"


def write_outputs(journal: Journal) -> None:
    """Write `compare.csv`, `compare.json` and `report.html` from the cells there are, each whole or not at all."""
    cells = list(journal.cells.values())
    table, figures, page = (journal.folder / name for name in OUTPUTS)
    write_text(table, csv_text(cells))
    told = {"format": FORMAT, "format_version": FORMAT_VERSION, **journal.conditions}
    write_json(figures, {**told, "cells": [cell.to_dict() for cell in cells]})
    write_text(page, render(journal))


def csv_text(cells: Sequence[Cell]) -> str:
    """Return the cells as a table in CSV, a row each; what a cell lacks is empty."""
    texts = list(dict.fromkeys(name for cell in cells for name in cell.texts))
    layers = list(dict.fromkeys(name for cell in cells for name in cell.layers))
    metrics = list(dict.fromkeys(name for cell in cells for name in cell.metrics))
    plain = ["method", "level", "seed", "done", "parameters", "bytes", "asked", "seconds", "memory"]
    head = [*plain, *(f"{what} {text}" for text in texts for what in ("kl", "loss")), *metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *(f"error {name}" for name in layers), "error"])
    for cell in cells:
        worth = [
            vars(cell.texts[name])[what] if name in cell.texts else None for name in texts for what in ("kl", "loss")
        ]
        row: list[Any] = [*(vars(cell)[name] for name in plain), *worth, *(cell.metrics.get(name) for name in metrics)]
        writer.writerow([*row, *(cell.layers.get(name) for name in layers), cell.error])
    return text.getvalue()


def render(journal: Journal) -> str:
    """Return the page as HTML."""
    rows = rows_of(journal.cells.values())
    original = next((row for row in rows if row.cell.method == ORIGINAL), None)
    others = [row for row in rows if row.cell.method != ORIGINAL]
    known = journal.conditions
    source = original.cell.bytes or 0 if original else 0
    draws = len(known["draws"])
    bits = f", experts in {known['bits']} bits" if known["bits"] else ""
    return TEMPLATES.get_template("compare.html").render(
        title=f"Methods compared on {known['model']}",
        subtitle=f"{draws} draw{'s' if draws > 1 else ''} of the calibration text{bits}. Figures are means over the "
        f"draws; memory is {known['memory']}.",
        figures=_figures(original),
        first=quality_picture([row for row in others if row.draws], source),
        methods=list(method_pictures(others, known["methods"])),
        layers=list(layer_pictures([row for row in others if row.draws])),
        failed=failed_table(others),
        version=version("hf_mcsmoe"),
    )


def _figures(original: Row | None) -> list[tuple[str, str, str]]:
    """Return the figures of the original: what they are, the figure, and a note."""
    if original is None:
        return []
    cell = original.cell
    found = [("size on disk", size(cell.bytes or 0), f"{cell.parameters:,} parameters")]
    return found + [(f"loss, {name}", figure(item.loss), "of the original") for name, item in cell.texts.items()]
