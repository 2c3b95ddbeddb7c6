"""How many experts each layer keeps: budgets over the layers."""

import torch

from hf_mcsmoe.methods.registry import Registry

BUDGET = Registry("budget")
# The budget that follows from what fewer experts of each layer cost; `search/budget.py` is what finds it.
MEASURED = "measured"


def budget_total(experts: int | float, sizes: list[int]) -> int:
    """Return how many experts all layers of `sizes` keep together: `experts` per layer on average, or a share."""
    return experts * len(sizes) if isinstance(experts, int) else max(len(sizes), round(experts * sum(sizes)))


@BUDGET.register("uniform", paper="2310.01334")
def uniform_budget(saliency: list[torch.Tensor], experts: int | float, min_experts: int) -> list[int]:
    """Return the number of experts per layer: the same everywhere (or the same share of each layer)."""
    counts = [experts if isinstance(experts, int) else round(experts * len(layer)) for layer in saliency]
    return [max(count, min_experts) for count in counts]


@BUDGET.register("adaptive", paper="2310.01334")
def adaptive_budget(saliency: list[torch.Tensor], experts: int | float, min_experts: int) -> list[int]:
    """Return the number of experts per layer: the most salient of all layers together (M-SMoE, section 3.1).

    Saliency is scaled to a maximum of 1 in each layer, so every layer keeps its first expert. The total is exact:
    ties go to the lower expert index, then to the earlier layer.
    """
    total = budget_total(experts, [len(layer) for layer in saliency])
    counts = [min(min_experts, len(layer)) for layer in saliency]
    candidates = []
    for position, layer in enumerate(saliency):
        scaled = layer / layer.max() if layer.max() > 0 else layer
        # Rounded: equal shares of two layers differ in their last bits after divisions by different numbers.
        candidates += [
            (-round(float(scaled[expert]), 12), expert, position)
            for expert in salient_first(layer)[counts[position] :]
        ]
    for _, _, position in sorted(candidates)[: total - sum(counts)]:
        counts[position] += 1
    return counts


@BUDGET.register(MEASURED)
def measured_budget(saliency: list[torch.Tensor], experts: int | float, min_experts: int) -> list[int]:
    """Refuse: `compress` shares out by what fewer experts were measured to cost, and needs no such function.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"budget={MEASURED!r} measures the model on calibration data, which `compress` does; a plan from statistics "
        "alone shares out by 'adaptive' or 'uniform'."
    )


def salient_first(saliency: torch.Tensor) -> list[int]:
    """Return the experts by falling saliency [E], ties by index."""
    return torch.argsort(saliency, descending=True, stable=True).tolist()
