"""The inputs that reach each expert, its features, and how alike two experts are by them."""

from collections.abc import Callable

import torch

from hf_mcsmoe.methods.gram import gram, weights_gram
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


def _input_sums(routed: Routed, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the sum of a function of the inputs [n, D] over those that reached each expert, float64 [E, D]."""
    rows = routed.per_input()
    values = of(rows.hidden.double())
    picks = rows.index.masked_fill(~rows.reached, rows.num_experts)  # the others go to a row of their own
    total = values.new_zeros(rows.num_experts + 1, values.shape[1])
    for picked in picks.T:
        total.index_add_(0, picked, values)
    return total[:-1]


@STATISTICS.register("feature_sum", axes="ED", signed=True)
def feature_sum(routed: Routed) -> torch.Tensor:
    """Return the sum of the inputs x that reached each expert, float64 [E, D]."""
    return _input_sums(routed, lambda inputs: inputs)


@STATISTICS.register("feature_abs_sum", axes="ED")
def feature_abs_sum(routed: Routed) -> torch.Tensor:
    """Return the sum of `|x|`, entry by entry, over the inputs x that reached each expert, float64 [E, D]."""
    return _input_sums(routed, torch.abs)


@STATISTICS.register("feature_squares", axes="ED")
def feature_squares(routed: Routed) -> torch.Tensor:
    """Return the sum of `x^2`, entry by entry, over the inputs x that reached each expert, float64 [E, D]."""
    return _input_sums(routed, torch.square)


@SIMILARITY.register("feature", paper="2310.01334", needs=["feature_sum"])
def feature(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' mean inputs, float64 [E, E]; an expert that no token reached is like none.

    The features of M-SMoE's ablation are the inputs of the experts (released code), not their hidden units.
    """
    return cosines(gram(view.sums["feature_sum"]))


@SIMILARITY.register("feature_abs", paper="2310.01334", needs=["feature_abs_sum"])
def feature_abs(view: LayerView) -> torch.Tensor:
    """Return the cosine of the means of `|x|` over the experts' inputs x, float64 [E, E]; see `feature`."""
    return cosines(gram(view.sums["feature_abs_sum"]))


@SIMILARITY.register("weight_feature", paper="2310.01334", needs=["feature_squares"])
def weight_feature(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' W_in, each column times the norm of its inputs, float64 [E, E].

    Column d of an expert's gate and up is multiplied by `sqrt(sum x_d^2)` over the inputs x that reached it (released
    code of M-SMoE; W_out and biases do not count). An expert that no token reached is like none.
    """
    norms = view.sums["feature_squares"].sqrt()
    tensors = [view.experts.tensors[role] for role in ("gate", "up") if role in view.experts.tensors]

    def part(expert: int, role: int, rows: slice) -> torch.Tensor:
        matrix = tensors[role][expert][rows]
        return matrix * norms[expert].to(matrix.device)

    return cosines(weights_gram(len(view.experts), [tensor[0].shape for tensor in tensors], part))
