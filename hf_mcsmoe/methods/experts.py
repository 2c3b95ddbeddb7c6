"""The experts of one layer as tensors, whatever the architecture.

Letters, here and everywhere: L MoE layers, E experts of a layer before, G after (groups), T tokens, K top-k, D model
width, F expert width, R rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

# Axis of F in one expert's tensor. `down_bias` [D] has none.
HIDDEN_AXES = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0, "down_bias": None}

# One expert: its tensors by role.
Expert = dict[str, torch.Tensor]
# The hidden states [n, F] that follow from `gate @ x` (None for ungated experts) and `up @ x`.
Activation = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]
Tensors = Mapping[str, Sequence[torch.Tensor] | torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """E experts: their tensors by role, views of the model's parameters where possible, and what they compute.

    `up` [F, D] and `down` [D, F] always; `gate` [F, D] for gated experts; `gate_bias` [F], `up_bias` [F], `down_bias`
    [D] for biased ones. An expert maps x to `down @ activation(gate @ x, up @ x)`; a few families have a `norm` behind
    that. `gradients` are those of the loss with respect to the tensors, where there was a backward pass.
    """

    tensors: Tensors
    activation: Activation
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    gradients: Tensors | None = None

    def __len__(self) -> int:
        return len(self.tensors["down"])

    def expert(self, index: int) -> Expert:
        """Return expert `index` as a dictionary of its tensors."""
        return {role: tensor[index] for role, tensor in self.tensors.items()}

    def gradient(self, index: int) -> Expert:
        """Return the gradients of expert `index` as a dictionary.

        Raises:
            ValueError: no backward pass was made; a statistic asks for it with `gradients=True`.
        """
        if self.gradients is None:
            raise ValueError("The experts have no gradients: register the statistic with gradients=True.")
        return {role: tensor[index] for role, tensor in self.gradients.items()}

    def set_expert(self, index: int, weights: Expert) -> None:
        """Write `weights` into expert `index`, cast to its dtype and moved to its device."""
        for role, tensor in self.tensors.items():
            tensor[index].copy_(weights[role])

    def hidden(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [n, F] of expert `index` for its inputs [n, D], computed in float32 or higher."""
        return self.hidden_of(self.expert(index), states)

    def hidden_of(self, expert: Expert, states: torch.Tensor) -> torch.Tensor:
        """Return what `hidden` does, of an expert by its tensors, which need not be one of these."""
        states = _wide(states)
        gate = _linear(expert, states, "gate") if "gate" in expert else None
        return self.activation(gate, _linear(expert, states, "up"))

    def output(self, index: int, states: torch.Tensor, *, normed: bool = True) -> torch.Tensor:
        """Return the output [n, D] of expert `index` for its inputs [n, D], computed in float32 or higher.

        Args:
            normed: whether a norm that follows the experts is applied.
        """
        output = output_of(self.expert(index), self.hidden(index, states))
        return self.norm(output) if self.norm and normed else output


def output_of(expert: Expert, hidden: torch.Tensor) -> torch.Tensor:
    """Return the output [n, D] of an expert, before any norm, by its hidden states [n, F]."""
    return _linear(expert, hidden, "down")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _linear(expert: Expert, states: torch.Tensor, role: str) -> torch.Tensor:
    """Return `states` [n, in] times a matrix [out, in], plus its bias where there is one."""
    bias = expert.get(f"{role}_bias")
    return linear(states, expert[role].to(states), None if bias is None else bias.to(states))


def permute(expert: Expert, permutation: torch.Tensor) -> Expert:
    """Return the expert with its hidden neurons reordered: neuron j becomes the old neuron `permutation[j]`.

    The expert's function is unchanged (paper, section 3.1: `W_in <- P W_in`, `W_out <- W_out P^T`).
    """
    permuted = dict(expert)
    for role, tensor in expert.items():
        if (axis := HIDDEN_AXES[role]) is not None:
            permuted[role] = tensor.index_select(axis, permutation.to(tensor.device))
    return permuted
