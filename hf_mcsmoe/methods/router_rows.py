"""The rows of the router, and how alike two experts are by them."""

import torch

from hf_mcsmoe.methods.gram import gram
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView


@STATISTICS.register("input_squares", axes="D")
def input_squares(routed: Routed) -> torch.Tensor:
    """Return the sum of `x^2`, entry by entry, over the layer's inputs x, wherever they go, float64 [D]."""
    return routed.hidden.double().square().sum(0)


@SIMILARITY.register("router_weight", paper="2310.01334")
def router_weight(view: LayerView) -> torch.Tensor:
    """Return the cosine of the router's rows of two experts, float64 [E, E]."""
    return cosines(gram(_rows(view)))


@SIMILARITY.register("router_weight_feature", paper="2310.01334", needs=["input_squares"])
def router_weight_feature(view: LayerView) -> torch.Tensor:
    """Return the cosine of the router's rows, each column times the norm of its inputs, float64 [E, E].

    Column d is multiplied by `sqrt(sum x_d^2)` over all tokens x of the layer (released code of M-SMoE).

    Raises:
        ValueError: the router has no such matrix, or reads other inputs than the experts.
    """
    rows, norms = _rows(view), view.sums["input_squares"].sqrt()
    if rows.shape[1] != len(norms):
        raise ValueError(
            f"The router of this layer reads {rows.shape[1]} inputs and the experts other {len(norms)}, of which the "
            "norms are: choose another similarity, e.g. router_weight."
        )
    return cosines(gram(rows * norms))


def _rows(view: LayerView) -> torch.Tensor:
    """Return the router's rows, float64 [E, D] on the CPU.

    Raises:
        ValueError: it has no such matrix.
    """
    if view.router is None:
        raise ValueError(
            f"The router of this layer has no matrix with a row for each of its {view.num_experts} experts, so that "
            "none can be compared: choose another similarity, e.g. router_logits."
        )
    return view.router.double().cpu()
