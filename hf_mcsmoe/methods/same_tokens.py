"""How alike the outputs of two experts are for the same tokens, whether these were sent to them or not.

The tokens are those of the layer's sample, as they are: where inputs are scaled by the router, without the scale.
"""

from collections.abc import Iterator

import torch

from hf_mcsmoe.methods.gram import BLOCK, gram, weights_gram
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.view import LayerView


def _outputs(view: LayerView) -> Iterator[torch.Tensor]:
    """Yield the outputs [T, D] of one expert after the other for the sample."""
    hidden = view.sample.hidden
    return (view.experts.output(expert, hidden) for expert in range(view.num_experts))


@SIMILARITY.register("expert_output", paper="2410.08589", needs=["sample"])
def expert_output(view: LayerView) -> torch.Tensor:
    """Return minus the distance of the experts' mean outputs for the same tokens, float64 [E, E].

    (HC-SMoE, section 3: the Euclidean distance of the mean outputs of all experts over all tokens.)
    """
    means = torch.stack([outputs.double().mean(0).cpu() for outputs in _outputs(view)])
    return -torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")


@SIMILARITY.register("cka", paper="2407.09590", needs=["sample"])
def cka(view: LayerView) -> torch.Tensor:
    """Return the linear CKA of two experts' outputs for the same tokens, float64 [E, E].

    `|Y^T X|^2 / (|X^T X| |Y^T Y|)` for outputs X, Y [T, D] less their means over the tokens (DEK): the cosine of the
    kernels X X^T and Y Y^T [T, T], which are what is held of each expert.
    """
    kernels = []
    for outputs in _outputs(view):
        centred = outputs - outputs.mean(0)
        kernels.append((centred @ centred.T).cpu())
    return cosines(weights_gram(view.num_experts, [kernels[0].shape], lambda expert, _, rows: kernels[expert][rows]))


@SIMILARITY.register("gated_mixture", paper="2604.04356", needs=["sample", "logit_gram"])
def gated_mixture(view: LayerView) -> torch.Tensor:
    """Return the mean of how alike two experts' gated outputs and router logits are, float64 [E, E] in [0, 1] (REAM).

    Of the outputs it is `(1 + cos) / 2` of the means of `p f(x)` over the same tokens, where p is the softmax of all
    logits; of the logits 1 less the distance of their normalised columns, over the largest (released code).
    """
    gates = view.sample.logits[:, : view.num_experts].double().softmax(1)
    means = [(outputs * gates[:, expert, None]).mean(0).cpu() for expert, outputs in enumerate(_outputs(view))]
    by_output = (1 + cosines(gram(torch.stack(means)))) / 2
    distances = squared_distances(cosines(view.sums["logit_gram"])).sqrt()
    by_logits = 1 - distances / distances.max().clamp(min=torch.finfo(torch.float64).tiny)
    return (by_output + by_logits) / 2


def output_gram(view: LayerView) -> torch.Tensor:
    """Return the inner products of two experts' outputs, summed over the sample, float64 [E, E] on the CPU."""
    total = torch.zeros(view.num_experts, view.num_experts, dtype=torch.float64)
    hidden = view.sample.hidden
    for part in hidden.split(max(1, BLOCK // (view.num_experts * hidden.shape[1]))):
        outputs = [view.experts.output(expert, part).flatten() for expert in range(view.num_experts)]
        total += gram(torch.stack(outputs)).cpu()
    return total


def squared_distances(products: torch.Tensor) -> torch.Tensor:
    """Return `|x_i - x_j|^2` [E, E] by the inner products of the x_i [E, E]."""
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).fill_diagonal_(0)
