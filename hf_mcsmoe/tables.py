"""What a record tells, as rows of text and as words: for the card, the command line and the report alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_mcsmoe.methods.specialisation import Specialisation
from hf_mcsmoe.record import Costs, Quality, SizeChoice, Stored


def cost_rows(costs: Mapping[str, Costs]) -> list[list[str]]:
    """Return a table of costs, a column per stage and what the last saves against the first; head first.

    What no stage measured gets no row.
    """
    figures: dict[str, list[Any]] = {
        "parameters": [item.parameters for item in costs.values()],
        "bytes": [item.bytes_resident for item in costs.values()],
        "bytes on disk": [item.bytes_on_disk for item in costs.values()],
        "FLOPs per token": [item.flops_per_token for item in costs.values()],
        "of them in experts": [2 * sum(item.expert_macs_per_token.values()) or None for item in costs.values()],
        "tokens/s": [item.tokens_per_second for item in costs.values()],
    }
    rows = [["", *costs, "saved"]]
    for label, values in figures.items():
        first, last = values[0], values[-1]
        saved = f"{1 - last / first:.1%}" if first and last is not None and label != "tokens/s" else ""
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else f"{value:,.0f}" for value in values), saved])
    return rows


def quality_rows(quality: Mapping[str, Quality]) -> list[list[str]]:
    """Return a table of loss and divergence, a column per stage; head first. What no stage measured gets no row."""
    figures = {
        "loss": [item.loss for item in quality.values()],
        "KL to the original": [item.kl for item in quality.values()],
        "loss, other text": [item.check_loss for item in quality.values()],
        "KL, other text": [item.check_kl for item in quality.values()],
    }
    rows = [
        [label, *("" if value is None else f"{value:.4g}" for value in values)]
        for label, values in figures.items()
        if any(value is not None for value in values)
    ]
    return [["", *quality], *rows]


def layer_rows(layers: Mapping[str, Stored]) -> list[list[str]]:
    """Return a table of what became of layers, a row each; head first. What applies to no layer gets no column."""
    optional = {
        "by": [{"merge": "merging", "prune": "pruning"}.get(item.reduce, "") for item in layers.values()],
        "zeros": [str(item.constants) if item.is_zero else "" for item in layers.values()],
        "constants": [str(item.constants or "") if not item.is_zero else "" for item in layers.values()],
        "rank": [_distinct(item.rank) for item in layers.values()],
        "bits": [_distinct(item.bits) for item in layers.values()],
        "bytes": [f"{item.bytes:,}" if item.bytes else "" for item in layers.values()],
    }
    shown = {label: column for label, column in optional.items() if any(column)}
    if not any(item.reduce == "prune" for item in layers.values()):
        shown.pop("by", None)
    rows = [
        [name, str(item.before), str(item.after), *(column[number] for column in shown.values())]
        for number, (name, item) in enumerate(layers.items())
    ]
    return [["layer", "experts before", "after", *shown], *rows]


def specialisation_rows(layers: Mapping[str, Specialisation]) -> list[list[str]]:
    """Return a table of how specialised the experts of layers are, a row each; head first.

    What applies to no layer gets no column.
    """
    columns = {
        "of a token's gate": [f"{item.routing:.2f}" for item in layers.values()],
        "of the use": [f"{item.use:.2f}" for item in layers.values()],
        "at most": [f"{item.largest:.2f}" for item in layers.values()],
        "most together": ["{} and {} ({:.2f})".format(*item.pair) if item.pair else "" for item in layers.values()],
        "told of the label": [
            "" if item.information is None else f"{item.information:.3f} of {item.label:.2f}"
            for item in layers.values()
        ],
    }
    shown = {label: column for label, column in columns.items() if any(column)}
    rows = [[name, *(column[number] for column in shown.values())] for number, name in enumerate(layers)]
    return [["layer", *shown], *rows]


def size_lines(size: SizeChoice, measured: float | None) -> list[str]:
    """Return what is told of a size: what was asked for and chosen, and what that costs, predicted and measured."""
    lines = [f"{size.planned:,} of the {size.source:,} bytes of the original's weights; asked for: {size.asked:,}."]
    if size.reason:
        lines.append(size.reason)
    if (predicted := size.predicted_kl) is not None:
        found = "not measured" if measured is None else f"measured {measured:.4g}"
        lines.append(f"KL to the original: predicted {predicted:.4g}, {found}.")
    if len(size.checked) > 1:
        others = ", ".join(f"{name} {value:.4g}" for name, value in size.checked.items())
        lines.append(f"Compared at this size on held-out rows, of which {size.method} was taken: {others}.")
    return lines


def _distinct(values: Mapping[str, float]) -> str:
    """Return the values of a layer's weights in words, those that are alike once."""
    return " / ".join(dict.fromkeys(f"{value:g}" for value in values.values()))


def done_to(layers: Mapping[str, Stored]) -> list[str]:
    """Return what became of experts; of a model of which nothing is known, that they were merged."""
    words = {"merge": "merged", "prune": "pruned"}
    found = {item.reduce for item in layers.values()}
    return [words[reduce] for reduce in words if reduce in found] if layers else ["merged"]


def title_of(layers: Mapping[str, Stored], done: list[str]) -> str:
    """Return the second part of the title."""
    if done:
        return f"with {' and '.join(done)} experts"
    return "with experts in few bits" if bits_of(layers) else "with its own experts"


def layers_of(layers: Mapping[str, Stored], reduce: str) -> str:
    """Return which layers have fewer experts in one way, as part of a sentence."""
    number = sum(item.reduce == reduce for item in layers.values())
    fewer = sum(bool(item.reduce) for item in layers.values())
    return "each layer" if number == fewer else f"{number} layers" if number > 1 else "one layer"


def in_place_of(layers: Mapping[str, Stored]) -> str:
    """Return what stands in the place of pruned experts, in words; empty where the routers do not pick them."""
    if any(item.is_zero for item in layers.values()):
        return "zero"
    return "a constant" if any(item.constants for item in layers.values()) else ""


def bits_of(layers: Mapping[str, Stored]) -> str:
    """Return the bits of the experts' weights in words; empty where these are not few."""
    found = sorted({bits for item in layers.values() for bits in item.bits.values()})
    if not found:
        return ""
    least, most = found[0], found[-1]
    told = f"{least:.3g}{'' if least == most else f' to {most:.3g}'} bits a weight"
    whole = sum(not item.bits for item in layers.values())
    return told if not whole else f"{told} ({whole} of {len(layers)} layers as they were)"


def outcome(layers: Mapping[str, Stored]) -> str:
    """Return in a few words what became of the experts: how many are left, by what, of which rank and in what bits."""
    if not layers:
        return ""
    after, before = ([getattr(item, name) for item in layers.values()] for name in ("after", "before"))
    told = [f"{_range(after)} of {_range(before)} experts"]
    if any(item.reduce for item in layers.values()):
        told.append(" and ".join(done_to(layers)))
    ranks = [rank for item in layers.values() for rank in item.rank.values()]
    told += [f"rank {_range(ranks)}"] if ranks else []
    bits = bits_of(layers)
    return ", ".join([*told, bits] if bits else told)


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
