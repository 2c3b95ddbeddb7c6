"""How alike the outputs of two experts point, token by token."""

import torch

from hf_mcsmoe.methods.gram import BLOCK, gram
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.view import LayerView


@SIMILARITY.register("output_cosine", paper="2506.23266", needs=["sample"])
def output_cosine(view: LayerView) -> torch.Tensor:
    """Return the mean cosine of two experts' outputs for the same tokens, float64 [E, E] (Sub-MoE, section 3.2)."""
    hidden, number = view.sample.hidden, view.num_experts
    total = torch.zeros(number, number, dtype=torch.float64)
    for part in hidden.split(max(1, BLOCK // (number * hidden.shape[1]))):
        outputs = [torch.nn.functional.normalize(view.experts.output(e, part), dim=1) for e in range(number)]
        total += gram(torch.stack(outputs).flatten(1)).cpu()
    return total / len(hidden)
