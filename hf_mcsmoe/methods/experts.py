"""The experts of one layer as tensors, whatever the architecture.

Letters, here and everywhere: L MoE layers, E experts of a layer before, G after (groups), T tokens, K top-k, D model
width, F expert width, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Axis of F in one expert's tensor. `down_bias` [D] has none.
HIDDEN_AXES = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0, "down_bias": None}


@dataclass(frozen=True)
class ExpertWeights:
    """Tensors of E experts by role, each indexable by expert: views of the model's parameters where possible.

    `up` [F, D] and `down` [D, F] always; `gate` [F, D] for gated experts; `gate_bias` [F], `up_bias` [F], `down_bias`
    [D] for biased ones. An expert maps x to `down @ (act(gate @ x) * (up @ x))`, ungated `down @ act(up @ x)`.
    """

    tensors: Mapping[str, Sequence[torch.Tensor] | torch.Tensor]

    def __len__(self) -> int:
        return len(self.tensors["down"])

    def expert(self, index: int) -> dict[str, torch.Tensor]:
        """Return expert `index` as a dictionary of its tensors."""
        return {role: tensor[index] for role, tensor in self.tensors.items()}

    def set_expert(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Write `weights` into expert `index`, cast to its dtype and moved to its device."""
        for role, tensor in self.tensors.items():
            tensor[index].copy_(weights[role])


def permute(expert: dict[str, torch.Tensor], permutation: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the expert with its hidden neurons reordered: neuron j becomes the old neuron `permutation[j]`.

    The expert's function is unchanged (paper, section 3.1: `W_in <- P W_in`, `W_out <- W_out P^T`).
    """
    permuted = dict(expert)
    for role, tensor in expert.items():
        if (axis := HIDDEN_AXES[role]) is not None:
            permuted[role] = tensor.index_select(axis, permutation.to(tensor.device))
    return permuted
