"""The pictures of a comparison: quality against bytes, a table for each method, and the errors of layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_mcsmoe.compare.cells import Row
from hf_mcsmoe.report.charts import Cell as Coloured
from hf_mcsmoe.report.charts import cell_rows
from hf_mcsmoe.report.lines import Curve, lines
from hf_mcsmoe.report.pictures import Picture
from hf_mcsmoe.report.words import figure, short_names, size

# Powers of ten that colours tell apart.
POWERS = 4


def quality_picture(rows: Sequence[Row], source: int) -> Picture:
    """Return quality against bytes, a drawing for each text, those that were not calibrated on beside the first."""
    made = [row for row in rows if row.cell.bytes is not None and row.cell.method]
    title, texts = "Quality against bytes", [*made[0].cell.texts] if made else []
    methods = list(dict.fromkeys(row.cell.method for row in made))
    drawings = [_drawing(made, methods, text) for text in texts]
    known = [item for item in drawings if item]
    if not known:
        return Picture(title, "No cell tells the divergence from the original.")
    caption = (
        "KL to the original in nats per position, a step for each power of ten, against the bytes of the weights "
        f"({size(source)} before). Each line is a method; lower and further left is better."
    )
    return Picture(title, caption, known, quality_table(made))


def _drawing(rows: Sequence[Row], methods: Sequence[str], text: str) -> tuple[Any, str] | None:
    curves, colours = [], []
    for number, method in enumerate(methods):
        points = [
            (float(row.cell.bytes or 0), kl)
            for row in rows
            if row.cell.method == method and (kl := row.cell.texts[text].kl) is not None
        ]
        if points:
            curves.append(Curve(method, points))
            colours.append(number)
    if not curves:
        return None
    image = lines(f"KL against bytes, {text}", curves, colours, (size, _short), ("size on disk", "KL"))
    return image, text


def _short(value: float) -> str:
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def quality_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a row for each method and level, the best on the first text first within a level."""
    texts = [*rows[0].cell.texts]
    levels = list(dict.fromkeys(row.cell.level for row in rows))
    ordered = sorted(rows, key=lambda row: (levels.index(row.cell.level), _first_kl(row)))
    head = ["method", "level", "size on disk", *(f"KL, {text}" for text in texts)]
    return [
        head,
        *(
            [row.cell.method, row.cell.level, size(row.cell.bytes or 0), *(_kl(row, text) for text in texts)]
            for row in ordered
        ),
    ]


def _first_kl(row: Row) -> float:
    kl = next(iter(row.cell.texts.values())).kl
    return math.inf if kl is None else kl


def _kl(row: Row, text: str) -> str:
    told = figure(row.cell.texts[text].kl)
    is_first = text == next(iter(row.cell.texts))
    return f"{told} ± {figure(row.spread)}" if is_first and row.spread is not None else told


def method_pictures(rows: Sequence[Row], methods: Mapping[str, Any]) -> Iterator[Picture]:
    """Yield a table for each method, with a row for each level."""
    for name in dict.fromkeys(row.cell.method for row in rows if row.draws and row.cell.method):
        own = [row for row in rows if row.cell.method == name and row.draws]
        yield Picture(name, _told(methods.get(name, {})), table=method_table(own))


def method_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of one method; head first."""
    texts, metrics = [*rows[0].cell.texts], [*rows[0].cell.metrics]
    head = ["level", "size on disk", *(f"{what}, {text}" for text in texts for what in ("KL", "loss")), *metrics]
    rest = ["made of", "parameters", "seconds", "memory"]
    return [[*head, *rest], *(_level(row, texts, metrics) for row in rows)]


def _level(row: Row, texts: Sequence[str], metrics: Sequence[str]) -> list[str]:
    cell = row.cell
    worth = [told for text in texts for told in (_kl(row, text), figure(cell.texts[text].loss))]
    taken = [f"{cell.seconds:.1f}", "-" if cell.memory is None else size(cell.memory)]
    metric = [figure(cell.metrics[name]) for name in metrics]
    return [cell.level, size(cell.bytes or 0), *worth, *metric, cell.done, f"{cell.parameters:,}", *taken]


def _told(made_of: Mapping[str, Any]) -> str:
    """Return in a sentence what a method is made of."""
    config = made_of.get("config", {})
    if not config:
        return ""
    stages = ("saliency", "budget") if config["reduce"] == "prune" else ("similarity", "grouping", "merging", "budget")
    told = [f"reduce: {config['reduce']}", *(f"{stage}: {config[stage]}" for stage in stages if config[stage])]
    told += [f"repair: {made_of['repair']['method']}"] if "repair" in made_of else []
    told += [f"left out inside experts by: {made_of['sparsity']['score']}"] if "sparsity" in made_of else []
    told += [f"rank: {made_of['low_rank']['rank']}"] if "low_rank" in made_of else []
    told += [f"bits: {made_of['quantization']['bits']}"] if "quantization" in made_of else []
    return ", ".join(told) + ("; at a size, all of this is searched for." if "search" in made_of else ".")


def layer_pictures(rows: Sequence[Row]) -> Iterator[Picture]:
    """Yield the errors of layers at each level, a row for each method."""
    for level in dict.fromkeys(row.cell.level for row in rows if row.cell.layers):
        yield _layers(level, [row for row in rows if row.cell.level == level and row.cell.layers])


def _layers(level: str, rows: Sequence[Row]) -> Picture:
    names = [*rows[0].cell.layers]
    powers = [math.log10(value) for row in rows for value in row.cell.layers.values() if value > 0]
    low, high = (math.floor(min(powers)), math.ceil(max(powers))) if powers else (-1, 0)
    cells = [[[_coloured(row.cell.layers[name])] for name in names] for row in rows]
    low = max(low, high - POWERS)  # what is no more than rounding leaves the others apart
    image = cell_rows(f"Errors of layers, {level}", [row.cell.method for row in rows], cells, low, max(high, low + 1))
    short = short_names(names)
    return Picture(
        f"Errors of layers, {level}",
        "Squared error of each layer's output over the squared output, at held-out inputs of the original: a row for "
        "each method, a cell for each layer, coloured by powers of ten.",
        [(image, "")],
        [
            ["method", *short],
            *([row.cell.method, *(figure(row.cell.layers[name]) for name in names)] for row in rows),
        ],
    )


def _coloured(value: float) -> Coloured:
    told = f"{value:.1f}" if value >= 1 else f"{value:.2f}"[1:]
    return Coloured(told, math.log10(value) if value > 0 else None)


def failed_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells that could not be made, with the reason; head first."""
    failed = [row.cell for row in rows if row.cell.error]
    return [["method", "level", "why"], *([cell.method, cell.level, cell.error] for cell in failed)]
