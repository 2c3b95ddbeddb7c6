"""What `hf-mcsmoe plan` prints."""

from rich.markup import escape

from hf_mcsmoe.cli.display import Sheet
from hf_mcsmoe.forecast.figures import Figures
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.stored import BY_CONFIG, BY_INDEX, FILES, Stored
from hf_mcsmoe.search.ladder import Rung
from hf_mcsmoe.search.size import bytes_text

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
