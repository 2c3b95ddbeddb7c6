"""The pictures of one result and of several: what each shows, in words, as a drawing and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from markupsafe import Markup

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.specialisation import specialisation
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.report.charts import Cell, Part, cell_rows, paired_bars, share_rows, square
from hf_mcsmoe.report.result import LayerResult, Result
from hf_mcsmoe.report.words import figure, share, short_names, size
from hf_mcsmoe.tables import specialisation_rows

# Experts of a layer that are drawn one by one; of more, some share a cell.
MOST_CELLS = 64
# Groups of a layer with more experts whose shares are drawn; the others are drawn as one.
MOST_GROUPS = 16
# Layers above which squares of similarities are drawn with half as many cells.
MOST_SQUARES = 16
OTHER_MODEL = "The file of statistics was taken from another model than this one's original."


@dataclass(frozen=True)
class Picture:
    """A title, a caption, drawings with what stands under each, and a table with the head first.

    Without drawings the caption says why.
    """

    title: str
    caption: str
    drawings: Sequence[tuple[Markup, str]] = ()
    table: Sequence[Sequence[str]] = ()


def pictures(result: Result, statistics: RoutingStatistics | None = None) -> list[Picture]:
    """Return the pictures of one result."""
    found = [bytes_per_layer(result), groups_of_experts(result), routing(result), errors(result)]
    return found if statistics is None else [*found, similarities(result, statistics), specialised(result, statistics)]


def bytes_per_layer(result: Result) -> Picture:
    """Return the bytes of the experts of each layer before and after."""
    labels = short_names([layer.name for layer in result.layers])
    pairs = [(layer.bytes_before, layer.bytes_after) for layer in result.layers]
    before, after = (sum(values) for values in zip(*pairs, strict=True))
    rows = [
        [layer.name, str(len(layer.expert_map)), str(len(layer.groups)), f"{old:,}", f"{new:,}", share(new, old)]
        for layer, (old, new) in zip(result.layers, pairs, strict=True)
    ]
    return Picture(
        "Bytes of experts per layer",
        f"{size(before)} before, {size(after)} after: {share(after, before)} of the original experts.",
        [(paired_bars("Bytes of the experts of each layer, before and after", labels, pairs, size), "")],
        [["layer", "experts before", "after", "bytes before", "after", "share"], *rows],
    )


def groups_of_experts(result: Result) -> Picture:
    """Return which experts became one and how alike they are to the dominant one."""
    title = "Which experts became one"
    table = [["layer", "group", "dominant", "members, with their similarity to it"]]
    table += [row for layer in result.layers if len(layer.expert_map) <= MOST_CELLS for row in _group_rows(layer)]
    if all(layer.similarity is None for layer in result.layers):
        told = "The plan that lies beside the model does not tell how alike experts are"
        caption = f"Experts by their group, without colours. {told}; that of a result made anew does."
    else:
        method = f" (method {result.similarity})" if result.similarity else ""
        caption = f"Each row is a layer, each cell an expert, coloured by its similarity to the dominant one{method}. "
    is_large = any(len(layer.expert_map) > MOST_CELLS for layer in result.layers)
    caption += (
        f"Experts are in the order of their similarity, of layers with more than {MOST_CELLS} several to a cell; "
        "dominant ones, which are like themselves, are left out."
        if is_large
        else "Touching cells are one group; the framed or underlined one is dominant."
    )
    if any(layer.pruned for layer in result.layers):
        caption += " The last ones of a layer, without colour, were pruned away."
    values = [value for layer in result.layers for value in layer.similarity or () if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    cells = [_binned(layer) if is_large else _cells(layer) for layer in result.layers]
    labels = short_names([layer.name for layer in result.layers])
    image = cell_rows("Experts of each layer by group, coloured by similarity", labels, cells, low, high)
    return Picture(title, caption, [(image, "")], table if len(table) > 1 else _summary(result))


def _group_rows(layer: LayerResult) -> list[list[str]]:
    """Return a row for each group of several experts."""
    rows = []
    for group, members in enumerate(layer.groups):
        if len(members) > 1:
            first = str(layer.dominant[group]) if layer.dominant else "-"
            others = [_with_similarity(layer, expert) for expert in members if str(expert) != first]
            rows.append([layer.name, str(group), first, ", ".join(others)])
    return rows


def _with_similarity(layer: LayerResult, expert: int) -> str:
    return f"{expert} ({figure(layer.similarity[expert])})" if layer.similarity else str(expert)


def _summary(result: Result) -> list[list[str]]:
    """Return a row for each layer: its groups, and how alike their members are to the dominant experts."""
    rows = [["layer", "experts", "groups", "largest group", "least similarity", "mean similarity"]]
    for layer in result.layers:
        values = _of_members(layer)
        mean = sum(values) / len(values) if values else None
        counts = (len(layer.expert_map), len(layer.groups), max(map(len, layer.groups)))
        rows.append([layer.name, *map(str, counts), figure(min(values, default=None)), figure(mean)])
    return rows


def _of_members(layer: LayerResult) -> list[float]:
    """Return the similarities of all merged experts but the dominant ones, in order."""
    known = enumerate(layer.similarity or ())
    others = {*(layer.dominant or ()), *layer.pruned}
    return sorted(value for expert, value in known if value is not None and expert not in others)


def _cells(layer: LayerResult) -> list[list[Cell]]:
    known, dominant = layer.similarity or [None] * len(layer.expert_map), set(layer.dominant or ())
    cells = [[Cell(str(expert), known[expert], expert in dominant) for expert in group] for group in layer.groups]
    return [*cells, *([Cell(str(expert), None)] for expert in layer.pruned)]


def _binned(layer: LayerResult) -> list[list[Cell]]:
    """Return at most `MOST_CELLS` cells, each the mean of neighbours in the order of similarity."""
    values = _of_members(layer)
    count = min(len(values), MOST_CELLS)
    edges = [place * len(values) // max(count, 1) for place in range(count + 1)]
    bins = [values[start:end] for start, end in pairwise(edges)]
    return [[Cell("", sum(found) / len(found)) for found in bins]] if bins else [[Cell("", None)]]


def routing(result: Result) -> Picture:
    """Return the share of picks of each expert and of each group."""
    title = "Where the router sent its tokens"
    known = [layer for layer in result.layers if layer.counts and sum(layer.counts)]
    if not known:
        return Picture(title, "The plan that lies beside the model does not tell how often each expert was picked.")
    is_large = any(len(layer.expert_map) > MOST_CELLS for layer in known)
    labels = short_names([layer.name for layer in known])
    caption = "Each row is a layer, each part as wide as its share of the picks in the calibration data. "
    caption += (
        f"The {MOST_GROUPS} busiest groups of each layer, and the others as one."
        if is_large
        else "Touching parts are one group, numbered by its dominant expert."
    )
    legend = [("strong", "dominant"), ("weak", "merged into it")]
    if any(layer.pruned for layer in known):
        legend.append(("before", "pruned away"))
    if is_large:
        legend = [("strong", "groups, the busiest first"), ("weak", "all others")]
    rows = [_busiest(layer) if is_large else _shares(layer) for layer in known]
    image = share_rows("Share of the picks of each expert and each group", labels, rows, legend)
    return Picture(title, caption, [(image, "")], _routing_table(known))


def _shares(layer: LayerResult) -> list[list[Part]]:
    counts, dominant = layer.counts or [], set(layer.dominant or ())
    total = sum(counts)
    return [
        [Part(counts[expert] / total, "strong" if expert in dominant else "weak", str(expert)) for expert in group]
        for group in layer.groups
    ] + [[Part(counts[expert] / total, "before", str(expert))] for expert in layer.pruned]


def _busiest(layer: LayerResult) -> list[list[Part]]:
    counts = layer.counts or []
    shares = sorted((sum(counts[expert] for expert in group) / sum(counts) for group in layer.groups), reverse=True)
    rest = 1 - sum(shares[:MOST_GROUPS])  # experts that were pruned away among them
    return [*([Part(value, "strong")] for value in shares[:MOST_GROUPS]), [Part(rest, "weak")]]


def _routing_table(layers: Sequence[LayerResult]) -> list[list[str]]:
    """Return a row for each layer: tokens of picks, and shares of the busiest and the quietest."""
    rows = [["layer", "picks", "busiest expert", "quietest expert", "busiest group", "experts never picked"]]
    for layer in layers:
        counts, total = layer.counts or [], sum(layer.counts or ())
        groups = [sum(counts[expert] for expert in group) for group in layer.groups]
        shares = (f"{value / total:.1%}" for value in (max(counts), min(counts), max(groups)))
        rows.append([layer.name, f"{total:,}", *shares, str(counts.count(0))])
    return rows


def errors(result: Result) -> Picture:
    """Return the relative error of the outputs of each layer before and after the repair."""
    title = "Error per layer before and after repair"
    known = [layer for layer in result.layers if layer.error_before is not None]
    if not known:
        is_repaired = any(step.title == "Repair" for step in (result.record.steps if result.record else ()))
        return Picture(
            title,
            "The record was written by a version that did not keep the errors of layers."
            if is_repaired
            else "No layer was repaired, or no record lies beside the model.",
        )
    pairs = [(layer.error_before, layer.error_after) for layer in known]
    image = paired_bars(title, short_names([layer.name for layer in known]), pairs, figure)
    rows = [[layer.name, figure(layer.error_before), figure(layer.error_after)] for layer in known]
    return Picture(
        title,
        "Distance of a layer's outputs to the original's, over the norm of those, on tokens held out of the fit.",
        [(image, "")],
        [["layer", "before", "after"], *rows],
    )


def specialised(result: Result, statistics: RoutingStatistics) -> Picture:
    """Return how sure the original's routers are of a token, and how evenly they use their experts."""
    title = "How specialised the original's experts are"
    if statistics.fingerprint != result.fingerprint:
        return Picture(title, OTHER_MODEL)
    try:
        found = {name: specialisation(sums) for name, sums in statistics.layers.items()}
    except ValueError as error:
        return Picture(title, f"The file of statistics does not tell: {error}")
    pairs = [(item.use, item.routing) for item in found.values()]
    names = ("of their use", "of a token's gate")
    return Picture(
        title,
        "Entropies in nats. Experts are used evenly where the bar is long; a router is sure where the bar is short.",
        [(paired_bars(title, short_names(list(found)), pairs, figure, names), "")],
        specialisation_rows(found),
    )


def similarities(result: Result, statistics: RoutingStatistics) -> Picture:
    """Return a square for each layer: how alike any two of its experts are, in the order of their groups."""
    title = "How alike any two experts are"
    if statistics.fingerprint != result.fingerprint:
        return Picture(title, OTHER_MODEL)
    method = result.similarity if result.similarity in SIMILARITY.methods else "router_logits"
    try:
        layers = [layer for layer in result.layers if layer.is_merged]
        found = [_similarity(layer, statistics, method) for layer in layers]
    except ValueError as error:
        return Picture(title, f"The file of statistics does not tell by method {method}: {error}")
    if not found:
        return Picture(title, "Every layer keeps all its experts.")
    most = MOST_CELLS if len(layers) <= MOST_SQUARES else MOST_CELLS // 2
    low, high = min(float(matrix.min()) for matrix in found), max(float(matrix.max()) for matrix in found)
    labels = short_names([layer.name for layer in layers])
    drawings = [
        (_square(layer, matrix, most, low, high), label)
        for layer, matrix, label in zip(layers, found, labels, strict=True)
    ]
    caption = (
        f"A square for each merged layer (method {method}); experts in the order of their groups, a dot for each "
        f"dominant one. From {low:.2g}, the faintest, to {high:.2g}."
    )
    return Picture(title, caption, drawings)


def _no_experts() -> Experts:
    raise ValueError("it reads the weights of experts, and a report loads none.")


def _similarity(layer: LayerResult, statistics: RoutingStatistics, method: str) -> torch.Tensor:
    """Return the similarities [E, E] of a layer, its experts in the order of their groups."""
    view = LayerView(statistics[layer.name], len(layer.expert_map), 0, _no_experts)
    matrix: torch.Tensor = SIMILARITY[method](view)
    order = layer.order
    return torch.nan_to_num(matrix[order][:, order].double())


def _square(layer: LayerResult, matrix: torch.Tensor, most: int, low: float, high: float) -> Markup:
    """Return a drawing of a matrix [E, E]; of more than `most` experts neighbours share a cell."""
    experts = len(matrix)
    if experts > most:
        matrix = torch.nn.functional.adaptive_avg_pool2d(matrix[None], most)[0]
    order, dominant = layer.order, set(layer.dominant or ())
    places = [place * len(matrix) / experts for place, expert in enumerate(order) if expert in dominant]
    return square(f"Similarity of the experts of {layer.name}", matrix.tolist(), places, low, high)
