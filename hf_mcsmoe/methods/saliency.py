"""How much an expert matters: saliency [E] from the statistics of its layer. One method, one function."""

import torch

from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.statistics import LayerStatistics

SALIENCY = Registry("saliency")


@SALIENCY.register("frequency", paper="2310.01334")
def frequency(statistics: LayerStatistics) -> torch.Tensor:
    """Return the share of tokens routed to each expert, float64 [E] (M-SMoE, section 3.1)."""
    return statistics.frequency


@SALIENCY.register("gate", paper="2310.01334")
def gate(statistics: LayerStatistics) -> torch.Tensor:
    """Return the routing weight that each expert received per token of the layer, float64 [E]."""
    return statistics.gate_sum / statistics.tokens.clamp(min=1)
