"""Stacked experts behind `@use_experts_implementation`: one adapter for every family, led by the run-time flags."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_mcsmoe.layers.layer import MoELayer, Sink, call_arguments, on_logits
from hf_mcsmoe.methods.experts import Experts

# Experts of the same layout whose class is not behind the interface's decorator and so carries no flags.
WITHOUT_FLAGS = ("Step3p7Experts", "LongcatFlashExperts")


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module holds experts in the layout of the experts interface of Transformers."""
    flagged = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    down = getattr(module, "down_proj", None)
    stacked = isinstance(down, nn.Parameter) and down.ndim == 3
    stored = bool(getattr(module, "low_rank", None) or getattr(module, "quantized", None))
    return (flagged or type(module).__name__ in WITHOUT_FLAGS) and (stacked or stored)


def fused_sizes(experts: Any) -> tuple[int, int, int]:
    """Return (E, D, F) of stacked experts, dense, low rank or quantized."""
    if "down_proj" in getattr(experts, "low_rank", {}):
        return (*experts.dense_shape("down_proj_u")[:2], experts.dense_shape("down_proj_v")[2])
    if "down_proj" in getattr(experts, "quantized", {}):
        return experts.dense_shape("down_proj")
    down = _stacked(experts, "down_proj")
    return (len(down), *down.shape[1:])


def fused_views(experts: Any, count: int | None = None) -> Experts:
    """Return views of the stacked parameters by role, for every layout that the interface's flags describe.

    Weights stored as low rank + sparse are multiplied out, those in few bits dequantized: copies, to be read only.

    Args:
        count: of how many experts, of the first ones; None for all.
    """
    down = _stacked(experts, "down_proj", count)
    tensors: dict[str, torch.Tensor] = {"down": down}
    name = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    tensors |= _split(experts, _stacked(experts, name, len(down)), "")
    if getattr(experts, "has_bias", False):
        tensors |= _split(experts, getattr(experts, name + "_bias").detach()[: len(down)], "_bias")
        tensors["down_bias"] = experts.down_proj_bias.detach()[: len(down)]
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    return Experts(tensors, lambda gate, up: _activated(experts, gate, up), norm)


def _activated(experts: Any, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [n, F] of what gate and up make of some inputs, as the family computes them."""
    if gate is None:
        return experts.act_fn(up)
    if not hasattr(experts, "_apply_gate"):
        return experts.act_fn(gate) * up
    if getattr(experts, "is_concatenated", True):
        return experts._apply_gate(torch.cat([gate, up], -1))
    return experts._apply_gate(torch.stack([gate, up], -1).flatten(-2))


def _stacked(experts: Any, name: str, count: int | None = None) -> torch.Tensor:
    """Return a stacked weight as [E, out, in], of the first `count` experts."""
    if name in getattr(experts, "low_rank", {}):
        return torch.stack([dense(factors).detach() for factors in experts.factors(name)[:count]])
    if name in getattr(experts, "quantized", {}):
        stack = experts.quantized_stack(name)
        return torch.stack([plain(stack[expert]) for expert in range(len(stack))[:count]])
    weight = getattr(experts, name).detach()[:count]
    return weight.mT if getattr(experts, "is_transposed", False) else weight


def dense(factors: Any) -> torch.Tensor:
    """Return W [out, in] of its `Factors`: for inspection and for further compression, never in a forward."""
    parts = (factors.u, factors.v, factors.s)
    dtype = next((part.dtype for part in parts if isinstance(part, torch.Tensor)), torch.float32)
    u, v, s = (plain(part, dtype) for part in parts)
    product = u @ v
    target = product.mT if factors.columns else product
    total = target + s * factors.kept[:, None] if factors.rows is None else target.index_add(0, factors.rows, s)
    return total.mT if factors.columns else total


def plain(matrix: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a matrix itself, or in a dtype what a quantized one stands for."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantized(dtype)


def _split(experts: Any, up: torch.Tensor, suffix: str) -> dict[str, torch.Tensor]:
    """Split `up` [E, F or 2F, ...] into gate and up, which lie one after the other or interleaved."""
    if not getattr(experts, "has_gate", True):
        return {"up" + suffix: up}
    if getattr(experts, "is_concatenated", True):
        gate, up = up.chunk(2, dim=1)
    else:
        gate, up = up[:, ::2], up[:, 1::2]
    return {"gate" + suffix: gate, "up" + suffix: up}


class FusedLayer(MoELayer):
    """Experts called as `experts(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K])`."""

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.container.named_parameters(recurse=False))

    def read(self) -> Experts:
        return fused_views(self.container)

    def read_first(self) -> dict[str, torch.Tensor]:
        return fused_views(self.container, 1).expert(0) if self.merged else super().read_first()

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        logits: list[torch.Tensor] = []

        def on_experts(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            hidden, index, weights = call_arguments(module, arguments, keywords)[:3]
            self.hand_over(sink, logits.pop(), hidden, index, weights)

        return [
            *on_logits(self, logits.append),
            self.container.register_forward_pre_hook(on_experts, with_kwargs=True),
        ]
