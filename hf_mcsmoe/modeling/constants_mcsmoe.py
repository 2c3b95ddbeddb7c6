"""Constants in the place of experts that were pruned away. This file travels with every checkpoint.

The router keeps all its outputs. Its map sends the experts that are gone to the numbers behind the G stored ones, and
a pick of one of these adds its weight times a vector (MoNE, arXiv 2507.00390); a vector of zeros adds nothing.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init


class Constants(nn.Module):
    """Base of G experts behind which may stand N constants: `approx_value` [N, D]."""

    num_experts: int
    num_constants = 0

    def install_constants(self, number: int) -> None:
        """Add `number` empty constants, of the dtype and on the device of the weights."""
        down = self.get_parameter("down_proj")
        width = down.shape[2 if getattr(self, "is_transposed", False) else 1]
        self.num_constants = number
        self.approx_value = nn.Parameter(down.new_empty(number, width), requires_grad=down.requires_grad)

    def init_constants(self) -> None:
        """Initialise what a checkpoint does not bring: with zeros."""
        if self.num_constants:
            init.zeros_(self.approx_value)

    def apart(self, index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the constants give together, [T, D], and the picks without them: pick 0 of weight 0 instead.

        Args:
            index: int [T, K], G to G + N - 1 for a constant.
            weights: [T, K], in whose dtype the sum is taken, or float32 if that is higher.
        """
        is_constant = index >= self.num_experts
        output = constant_output(self.approx_value, self.num_experts, index, weights)
        return output, index.masked_fill(is_constant, 0), weights.masked_fill(is_constant, 0)


def constant_output(
    values: torch.Tensor, num_experts: int, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum [T, D] of the constants `values` [N, D] that picks int [T, K] from G on stand for.

    Higher picks than G + N - 1 are of nothing.
    """
    place = index - num_experts
    known = (place >= 0) & (place < len(values))
    gates = weights.to(torch.promote_types(weights.dtype, torch.float32)).masked_fill(~known, 0)
    of_each = gates.new_zeros(len(index), len(values)).scatter_add(1, place.masked_fill(~known, 0), gates)  # [T, N]
    return of_each @ values.to(of_each)


def stored_count(expert_map: Sequence[int], approximate: Sequence[int]) -> int:
    """Return G of a map [E] -> [G + N] that sends the experts `approximate` to constants."""
    return len({at for expert, at in enumerate(expert_map) if expert not in approximate})


def num_constants(experts: nn.Module) -> int:
    """Return how many constants stand behind experts: none behind the library's own."""
    return getattr(experts, "num_constants", 0)
