"""Gradients of the loss with respect to the experts' weights: how alike two experts are by them, and how large."""

from collections.abc import Callable

import torch

from hf_mcsmoe.methods.gram import weights_gram
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _gram(routed: Routed, of: Pair) -> torch.Tensor:
    """Return the inner products of a function of all weights of an expert and their gradients, float64 [E, E]."""
    experts = routed.experts
    first, roles = experts.gradient(0), list(experts.tensors)
    gradients = experts.gradients or {}

    def part(expert: int, number: int, rows: slice) -> torch.Tensor:
        role = roles[number]
        return of(experts.tensors[role][expert][rows].double(), gradients[role][expert][rows].double())

    return weights_gram(len(experts), [first[role].shape for role in roles], part)


@STATISTICS.register("gradient_gram", gradients=True, axes="EE", signed=True)
def gradient_gram(routed: Routed) -> torch.Tensor:
    """Return the inner products of the gradients dL/dw of the experts for the loss of the batch, float64 [E, E]."""
    return _gram(routed, lambda weights, gradients: gradients)


@STATISTICS.register("weight_gradient_gram", gradients=True, axes="EE", signed=True)
def weight_gradient_gram(routed: Routed) -> torch.Tensor:
    """Return the inner products of `w dL/dw` of the experts for the loss of the batch, float64 [E, E]."""
    return _gram(routed, torch.mul)


@STATISTICS.register("gradient_abs", gradients=True, axes="E")
def gradient_abs(routed: Routed) -> torch.Tensor:
    """Return `sum |dL/dw|` over the weights w of each expert for the loss L of the batch, float64 [E]."""
    found = [routed.experts.gradient(expert).values() for expert in range(routed.num_experts)]
    return torch.stack([torch.stack([part.double().abs().sum() for part in parts]).sum() for parts in found])


@SIMILARITY.register("gradient", paper="2310.01334", needs=["gradient_gram"])
def gradient(view: LayerView) -> torch.Tensor:
    """Return the cosine of the gradients of the loss with respect to the experts' weights, float64 [E, E].

    Of several batches, their gradients are laid side by side; the released code of M-SMoE adds them up first, which
    is the same for one batch, and would take a second copy of all experts for more.
    """
    return cosines(view.sums["gradient_gram"])


@SIMILARITY.register("weight_gradient", paper="2310.01334", needs=["weight_gradient_gram"])
def weight_gradient(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' weights times the gradients of the loss, float64 [E, E]; see `gradient`."""
    return cosines(view.sums["weight_gradient_gram"])


@SALIENCY.register("gradient", needs=["gradient_abs"])
def gradient_size(view: LayerView) -> torch.Tensor:
    """Return `sum |dL/dw|` over an expert's weights, added over batches, float64 [E]."""
    return view.sums["gradient_abs"]
