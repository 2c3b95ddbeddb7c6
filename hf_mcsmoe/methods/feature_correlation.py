"""How well the hidden units of one expert can be found again in another."""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment

from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.units import standardised
from hf_mcsmoe.methods.view import LayerView


def _assigned(correlations: torch.Tensor) -> float:
    """Return the mean correlation of units matched one to one so that it is the largest."""
    rows, columns = linear_sum_assignment(-correlations.numpy())
    return float(correlations[rows, columns].mean())


def _best(correlations: torch.Tensor) -> float:
    """Return the mean over the units of both of the largest correlation with a unit of the other."""
    return float(correlations.amax(0).mean() + correlations.amax(1).mean()) / 2


@SIMILARITY.register("feature_correlation", paper="2310.01334", needs=["sample"])
def feature_correlation(view: LayerView) -> torch.Tensor:
    """Return `(1 + c) / 2` for the mean correlation c of hidden units, matched one to one, float64 [E, E] in [0, 1].

    Units are compared on the tokens of the sample that reached either expert; one exact assignment for each pair makes
    c the largest (released code of M-SMoE). A unit that never varies has correlation 0. Two experts that fewer than
    two tokens reached are wholly alike: nothing is known against it.
    """
    return _pairwise(view, of=_assigned)


@SIMILARITY.register("feature_correlation_max", paper="2310.01334", needs=["sample"])
def feature_correlation_max(view: LayerView) -> torch.Tensor:
    """Return `(1 + c) / 2` for the mean c of each hidden unit's largest correlation in the other expert.

    Float64 [E, E]; the mean of both directions, of which the released code of M-SMoE takes one. Else see
    `feature_correlation`.
    """
    return _pairwise(view, of=_best)


def _pairwise(view: LayerView, *, of: Callable[[torch.Tensor], float]) -> torch.Tensor:
    """Return `(1 + c) / 2` for a function c of the correlations [F, F] of two experts' units, float64 [E, E]."""
    rows = view.sample.per_input()
    reached = [(rows.reached & (rows.index == expert)).any(1) for expert in range(view.num_experts)]
    units = [view.experts.hidden(expert, rows.hidden) for expert in range(view.num_experts)]  # of each [T, F]
    found = torch.ones(view.num_experts, view.num_experts, dtype=torch.float64)
    for i in range(view.num_experts):
        for j in range(i):
            either = reached[i] | reached[j]
            if either.sum() > 1:
                one, other = standardised(units[i][either]), standardised(units[j][either])
                found[i, j] = found[j, i] = (1 + of((one.T @ other).cpu())) / 2
    return found
