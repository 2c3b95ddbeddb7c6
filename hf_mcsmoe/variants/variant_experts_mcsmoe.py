"""Experts of a variant's own, in the layout that the library's implementations compute. This file travels."""

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.integrations.moe import use_experts_implementation

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, VariantModule

# Grouped products need rows of whole 16 bytes, in bfloat16 too.
ALIGNED = 8


class ModelWithExperts(VariantModel):
    """A dense model in which a variant puts experts."""

    brings_experts: ClassVar[bool] = True

    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        """Return what is asked for; by default what can compute experts of this width."""
        if requested_experts is None and vars(self).get("has_own_experts"):
            experts = [module for module in self.modules() if isinstance(module, VariantExperts)]
            if any(module.intermediate_size % ALIGNED for module in experts):
                return "eager"
        return super().get_correct_experts_implementation(requested_experts)


@use_experts_implementation
class VariantExperts(VariantModule):
    """N experts of equal width, stacked as the library's are: gate_up_proj [N, 2 F, D] or up_proj [N, F, D]."""

    def __init__(self, config: Any, num_experts: int, shape: tuple[int, int], act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        self.intermediate_size, self.hidden_size = shape

    def allocate(self, has_gate: bool, has_bias: bool) -> None:
        """Make empty weights."""
        self.has_gate, self.has_bias = has_gate, has_bias
        experts, inner, outer = self.num_experts, self.intermediate_size, self.hidden_size
        up, rows = ("gate_up_proj", 2 * inner) if has_gate else ("up_proj", inner)
        shapes: dict[str, tuple[int, ...]] = {up: (rows, outer), "down_proj": (outer, inner)}
        if has_bias:
            shapes |= {f"{up}_bias": (rows,), "down_proj_bias": (outer,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *shape)))

    def init_weights(self, std: float) -> None:
        """Draw the weights as the family draws those of its linear layers."""
        for name, parameter in self.named_parameters(recurse=False):
            init.zeros_(parameter) if name.endswith("bias") else init.normal_(parameter, mean=0.0, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum [T, D] of the experts picked; the library's other implementations replace this.

        Args:
            hidden_states: [T, D].
            top_k_index: [T, k].
            top_k_weights: [T, k].
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            values = self._compute(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, values.to(output.dtype))
        return output

    def _compute(self, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        up = "gate_up_proj" if self.has_gate else "up_proj"
        weights = dict(self.named_parameters(recurse=False))
        biases = {name: weights[f"{name}_bias"][expert] if self.has_bias else None for name in (up, "down_proj")}
        inner = functional.linear(hidden_states, weights[up][expert], biases[up])
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return functional.linear(inner, weights["down_proj"][expert], biases["down_proj"])
