"""Which weights inside an expert matter least: scores of weights, and the patterns in which they are left out.

A weight's score is its size, or that times the norm of the input that it multiplies (Wanda), in which each token may
count by the gate that it was given (MoE-Pruner): an expert's matrices read its inputs, the last one its hidden units.
"""

from collections.abc import Callable

import torch

from hf_mcsmoe.methods.experts import HIDDEN_AXES, Expert
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

SCORE = Registry("score")
PATTERN = Registry("pattern")
MATRICES = ("gate", "up", "down")


def _squares(routed: Routed, states: Callable[[int, torch.Tensor], torch.Tensor], *, gated: bool) -> torch.Tensor:
    """Return the sum of `s^2` of what each expert makes of its inputs, float64 [E, ...]; with gates g of `(g s)^2`."""
    rows, sums = routed.per_input(), []
    for expert in range(rows.num_experts):
        token, pick = torch.where(rows.reached & (rows.index == expert))
        values = states(expert, rows.hidden[token]).double()
        if gated:
            values = values * rows.weights[token, pick, None].double()
        sums.append(values.square().sum(0))
    return torch.stack(sums)


def _inputs(expert: int, states: torch.Tensor) -> torch.Tensor:
    return states


@STATISTICS.register("inputs_squared", axes="ED", products=True)
def inputs_squared(routed: Routed) -> torch.Tensor:
    """Return the sum of the squares of each expert's inputs, float64 [E, D]."""
    return _squares(routed, _inputs, gated=False)


@STATISTICS.register("gated_inputs_squared", axes="ED", products=True)
def gated_inputs_squared(routed: Routed) -> torch.Tensor:
    """Return the sum of the squares of each expert's inputs times their gates, float64 [E, D]."""
    return _squares(routed, _inputs, gated=True)


@STATISTICS.register("units_squared", axes="EF", products=True)
def units_squared(routed: Routed) -> torch.Tensor:
    """Return the sum of the squares of each expert's hidden units, float64 [E, F]."""
    return _squares(routed, routed.experts.hidden, gated=False)


@STATISTICS.register("gated_units_squared", axes="EF", products=True)
def gated_units_squared(routed: Routed) -> torch.Tensor:
    """Return the sum of the squares of each expert's hidden units times the gates, float64 [E, F]."""
    return _squares(routed, routed.experts.hidden, gated=True)


@SCORE.register("magnitude", paper="1506.02626")
def magnitude(view: LayerView, index: int) -> Expert:
    """Return the absolute values of an expert's matrices by role, float32 or wider [out, in]."""
    expert = view.experts.expert(index)
    return {role: expert[role].abs().to(torch.float32) for role in MATRICES if role in expert}


@SCORE.register("wanda", paper="2306.11695", needs=["inputs_squared", "units_squared"])
def wanda(view: LayerView, index: int) -> Expert:
    """Return `|W_ij| * ||x_j||` over the tokens that reached the expert; of one that none did, the magnitudes."""
    return _times_norms(view, index, view.sums["inputs_squared"], view.sums["units_squared"])


@SCORE.register("moe_pruner", paper="2410.12013", needs=["gated_inputs_squared", "gated_units_squared"])
def moe_pruner(view: LayerView, index: int) -> Expert:
    """Return `|W_ij| * ||g x_j||`, for the gate g of each token; of an expert that none reached, the magnitudes."""
    return _times_norms(view, index, view.sums["gated_inputs_squared"], view.sums["gated_units_squared"])


def _times_norms(view: LayerView, index: int, inputs: torch.Tensor, units: torch.Tensor) -> Expert:
    """Return magnitudes times the norms of what they multiply, given as sums of squares [E, D] and [E, F]."""
    scores = magnitude(view, index)
    if not inputs[index].any():
        return scores
    norms = {role: units[index].sqrt() if role == "down" else inputs[index].sqrt() for role in scores}
    return {role: score * norms[role].to(score) for role, score in scores.items()}


@PATTERN.register("unstructured", paper="2306.11695")
def unstructured(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return which weights stay, bool [out, in]: all but the lowest share of each row. It saves no byte."""
    return _all_but_lowest(scores, round(share * scores.shape[1]))


@PATTERN.register("2:4", paper="2104.08378")
def two_of_four(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return which weights stay, bool [out, in]: two of each four inputs in a row. It saves no byte by itself.

    Raises:
        ValueError: the inputs are no multiple of four, or the share is another one than half.
    """
    if scores.shape[1] % 4 or share != 0.5:
        raise ValueError(
            f"The pattern 2:4 keeps two of each four inputs (sparsity 0.5): it cannot be had of {scores.shape[1]} "
            f"inputs with a sparsity of {share:g}; choose the pattern 'unstructured'."
        )
    return _all_but_lowest(scores.reshape(-1, 4), 2).view_as(scores)


def _all_but_lowest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Return all places of each row but so many of the lowest scores, of equal ones the first."""
    lowest = scores.argsort(dim=1, stable=True)[:, :number]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


def kept_units(scores: Expert, width: int) -> torch.Tensor:
    """Return the hidden units of an expert that stay, int [width] rising: those whose weights score most together.

    Args:
        scores: of the expert's matrices, by role.
    """
    total = sum(score.double().sum(1 - (HIDDEN_AXES[role] or 0)) for role, score in scores.items())
    return torch.as_tensor(total).argsort(descending=True, stable=True)[:width].sort().values
