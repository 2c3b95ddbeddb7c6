"""How alike the weights of two experts are, as they lie: no neuron is moved."""

import torch

from hf_mcsmoe.methods.gram import weights_gram
from hf_mcsmoe.methods.similarity import SIMILARITY, cosines
from hf_mcsmoe.methods.view import LayerView


@SIMILARITY.register("weight", paper="2310.01334")
def weight(view: LayerView) -> torch.Tensor:
    """Return the cosine of the experts' weights, all matrices and biases of one side by side, float64 [E, E]."""
    tensors = list(view.experts.tensors.values())
    shapes = [tensor[0].shape for tensor in tensors]
    return cosines(weights_gram(len(view.experts), shapes, lambda expert, role, rows: tensors[role][expert][rows]))
