"""Whether calibration rows are enough for a fit, and the number that would do."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from hf_mcsmoe.repair.fit import LayerFit, output_weight

# What a fit asks for of each unknown: so many tokens of the median expert.
TOKENS_PER_UNKNOWN = 2


@dataclass(frozen=True)
class Fitted:
    """One layer: the tokens that its median expert is fitted to, and the unknowns of each row of an output matrix."""

    tokens: int
    unknowns: int

    @classmethod
    def of(cls, layer: LayerFit) -> "Fitted":
        """Return what a layer's own tokens are, but for those held out."""
        experts = range(layer.experts.num_experts)
        tokens = [int((~layer.inputs.held_out[layer.tokens_of(expert)[0]]).sum()) for expert in experts]
        return cls(int(statistics.median(tokens)), output_weight(layer.experts, 0).shape[1])

    def rows_needed(self, rows: int) -> int:
        """Return how many calibration rows would do, where `rows` have given the tokens."""
        return math.ceil(rows * TOKENS_PER_UNKNOWN * self.unknowns / max(self.tokens, 1))


def few_rows(layers: Mapping[str, Fitted], rows: int) -> str | None:
    """Return the sentence that tells how many rows would do, of the layer that needs the most; None where all do.

    A layer's rows do where its median expert is fitted to twice as many tokens as it has unknowns.

    Args:
        layers: by their names.
        rows: of the calibration data.
    """
    needs = {name: layer.rows_needed(rows) for name, layer in layers.items()}
    name = max(needs, key=lambda name: needs[name], default="")
    if not needs or needs[name] <= rows:
        return None
    layer = layers[name]
    return (
        f"{rows:,} calibration rows leave the experts of {name} some {layer.tokens:,} tokens each, "
        f"for {layer.unknowns:,} hidden units: about {_rounded_up(needs[name]):,} rows would do."
    )


def _rounded_up(number: int) -> int:
    """Return a number of which only the first two digits are told, rounded up."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return math.ceil(number / unit) * unit
