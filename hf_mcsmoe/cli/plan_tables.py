"""What `hf-mcsmoe plan` prints."""

from collections.abc import Mapping, Sequence

from rich.markup import escape

from hf_mcsmoe.cli.display import Sheet
from hf_mcsmoe.forecast.figures import Figures
from hf_mcsmoe.forecast.needs import Needs
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.stored import BY_CONFIG, BY_INDEX, FILES, Stored
from hf_mcsmoe.search.ladder import Rung
from hf_mcsmoe.search.size import bytes_text

# The KL in nats per position that a safe size keeps to: about a hundredth of perplexity.
SAFE = 0.01
# Parts of memory below one in so many are not shown.
SHOWN = 200
# How the bytes of the source are known, in words.
KNOWN = {FILES: "", BY_INDEX: ", says their index", BY_CONFIG: ", by the configuration: no file was found"}


def figure_lines(layers: Layers, figures: Figures, stored: Stored) -> list[str]:
    """Return what a model is, in lines."""
    model, sizes = layers.model, sorted({layer.num_experts for layer in layers})
    experts = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    shared = f", in shared experts {figures.shared:,}" if figures.shared else ""
    return [
        f"[bold]{type(model).__name__}[/], family {model.config.model_type}",
        f"{figures.layers} layers of {experts} experts, top-{figures.top_k}, d {figures.hidden_size}, width "
        f"{figures.intermediate_size}",
        f"parameters {figures.parameters:,}, in experts {figures.in_experts:,} "
        f"({figures.in_experts / figures.parameters:.1%}){shared}, active per token {figures.active:,}",
        f"the weight files take {bytes_text(stored.bytes)}{KNOWN[stored.known_by]}",
    ]


def needs_table(needs: Mapping[str, Needs], seconds: Mapping[str, Mapping[str, float]]) -> Sheet:
    """Return a table of what a run takes: a column each way, and the parts of memory in the phase that takes most.

    Args:
        seconds: estimated, by way and part; empty where nothing was measured.
    """
    sheet, found = Sheet("", *needs), list(needs.items())
    sheet.add_row("memory", *(bytes_text(item.memory) for _, item in found))
    sheet.add_row("  most while", *(item.peak for _, item in found))
    parts = [item.phases[item.peak] for _, item in found]
    for name in dict.fromkeys(name for own in parts for name in own):
        shown = [own.get(name, 0) for own in parts]
        if max(shown) * SHOWN > max(item.memory for _, item in found):
            sheet.add_row(f"  {name}", *(bytes_text(size) if size else "" for size in shown))
    sheet.add_row("disk", *(bytes_text(item.disk) for _, item in found))
    sheet.add_row("read", *(bytes_text(item.read) for _, item in found))
    if seconds:
        sheet.add_row("time, an estimate", *(_duration(sum(seconds[name].values())) for name in needs))
        for part in seconds[found[0][0]]:
            sheet.add_row(f"  {part}", *(_duration(seconds[name][part]) for name in needs))
    return sheet


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def safe_rung(rungs: Sequence[Rung]) -> Rung | None:
    """Return the smallest of the sizes whose predicted effect, and that of all larger ones, stays below `SAFE`."""
    effects = [(rung.chosen.bytes, rung) for rung in rungs if rung.effect is not None]
    found = None
    for _, rung in sorted(effects, key=lambda item: -item[0]):
        if (rung.effect or 0.0) > SAFE:
            break
        found = rung
    return found


def safe_line(rung: Rung) -> str:
    """Return the sentence that names a safe size."""
    return (
        f"a safe size: {bytes_text(rung.chosen.bytes)}, the smallest of these with a predicted KL of at most {SAFE} "
        "nats on text like that which was measured"
    )


def rung_table(rungs: list[Rung], source: int) -> Sheet:
    """Return a table of sizes: experts, ranks and bits from the least to the most, and predicted effects."""
    sheet = Sheet("method", "size", "of the source", "experts", "rank", "bits", "predicted KL")
    for rung in rungs:
        choices = rung.chosen.choices.values()
        ranks = [choice.rank for choice in choices if choice.rank]
        bits = [grid.bits if grid else None for choice in choices for grid in (choice.w_in, choice.w_out)]
        sheet.add_row(
            escape(rung.method),
            bytes_text(rung.chosen.bytes),
            f"{rung.chosen.bytes / source:.3f}",
            _span([choice.experts for choice in choices]),
            _span(ranks) + (" or full" if 0 < len(ranks) < len(choices) else ""),
            _span([number for number in bits if number]) + (" or all" if None in bits and any(bits) else ""),
            "" if rung.effect is None else f"{rung.effect:.4g}",
        )
    return sheet


def _span(values: list[int]) -> str:
    least, most = (min(values), max(values)) if values else (None, None)
    return "" if least is None else str(least) if least == most else f"{least} to {most}"
