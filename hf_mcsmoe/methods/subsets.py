"""The experts that a layer can best do with alone, found by trying all subsets (NAEE), for layers of few experts."""

from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from math import comb

import torch

from hf_mcsmoe.methods.pruning import SELECTION
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.view import LayerView

# Subsets that are tried at most.
LIMIT = 100_000
# How a router may turn the logits of its experts [T, n] into their weights, before it picks and scales them.
RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
# A rule gives the weights that were seen up to this share of the largest, but for a few near ties among the picks.
NEAR, TURNED = 1e-2, 0.02


@SELECTION.register("exhaustive", paper="2402.14800", needs=["sample"])
def exhaustive(view: LayerView, saliency: torch.Tensor, count: int, groups: int) -> list[int]:
    """Return the experts that alone change the layer's output over the sample least: all subsets are tried (NAEE).

    How the router weighs the experts that are left follows from how it weighs all: by softmax or sigmoid, renormalised
    over its picks or not, times a constant.

    Args:
        saliency: [E], which does not matter.
        count: how many stay.
        groups: of the router; routers that pick among several are not known.

    Raises:
        ValueError: see `check_subsets`; or the weights that were seen follow from no such rule.
    """
    check_subsets(view.num_experts, count, groups)
    sample = view.sample.where(view.sample.reached.any(1))
    if sample.scale is not None:
        raise ValueError("selection='exhaustive' does not know routers that scale inputs: choose selection='salient'.")
    gates = _gates_of(sample)
    outputs = torch.stack([view.experts.output(expert, sample.hidden) for expert in range(view.num_experts)], 1)
    products = outputs @ outputs.mT  # [T, E, E]
    seen = _seen(sample)

    def error(subset: tuple[int, ...]) -> float:
        missed = gates(torch.tensor(subset)) - seen  # of the weights, [T, E]
        return float(torch.einsum("ti,tij,tj->", missed, products, missed))

    best = min((error(subset), subset) for subset in combinations(range(view.num_experts), count))
    return list(best[1])


def check_subsets(num_experts: int, count: int, groups: int = 1) -> None:
    """Raise ValueError where too many subsets of `count` experts would be tried, or of a router with groups."""
    number = comb(num_experts, count)
    if groups > 1 or number > LIMIT:
        why = (
            f"does not know routers that pick among {groups} groups of experts"
            if groups > 1
            else f"would try {number} subsets of {count} of {num_experts} experts, and tries {LIMIT} at most"
        )
        raise ValueError(f"selection='exhaustive' {why}: choose selection='salient'.")


def _seen(sample: Routed) -> torch.Tensor:
    """Return the weights of all experts [T, E], 0 of those that a token did not pick."""
    total = sample.weights.new_zeros(len(sample.index), sample.num_experts + 1)
    return total.scatter_add_(1, sample.index, sample.weights)[:, :-1]


def _gates_of(sample: Routed) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from the experts that are left, int [n], to the weights [T, E] of all.

    Raises:
        ValueError: no rule gives the weights that were seen.
    """
    seen, everyone = _seen(sample), torch.arange(sample.num_experts)
    for rule, renormalised in product(RULES, (False, True)):
        weigh = partial(_weighed, sample, rule=rule, renormalised=renormalised)
        factor = float(seen.sum() / weigh(everyone).sum())
        off = (factor * weigh(everyone) - seen).abs().amax(1) > NEAR * seen.amax(1)
        if off.float().mean() <= TURNED:
            return partial(weigh, factor=factor)
    raise ValueError(
        "selection='exhaustive' needs to know how the router weighs fewer experts, and the weights that it gives to "
        "all follow from no rule that is known: choose selection='salient'."
    )


def _weighed(
    sample: Routed, kept: torch.Tensor, *, rule: str, renormalised: bool, factor: float = 1.0
) -> torch.Tensor:
    """Return the weights [T, E] that a router of the experts `kept` gives its picks, by a rule."""
    kept = kept.to(sample.logits.device)
    weights, picks = RULES[rule](sample.logits[:, kept].float()).topk(min(sample.index.shape[1], len(kept)))
    if renormalised:
        weights = weights / weights.sum(1, keepdim=True)
    total = weights.new_zeros(len(weights), sample.num_experts)
    return total.scatter_(1, kept[picks], factor * weights)
