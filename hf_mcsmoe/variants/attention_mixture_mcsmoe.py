"""Mixtures of attention experts, computed all and weighed by a router (BAM). This file travels with its checkpoints.

`sum_i g_i(x) MHA_i(x)` with g the softmax of a router of its own over all N experts. It is computed as one attention
with N times the heads, whose outputs are weighed before the output projection: of the heads that share a key and a
value head, or would, those of one expert come after those of another. So one entry of the cache holds the keys and
values of all experts, and any cache and any implementation of attention does.

Source: Zhang and others, BAM (NeurIPS 2024, arXiv 2408.08274).
"""

import copy
from typing import Any, ClassVar, cast

import torch
from torch import nn

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, generated_in, subclass


class AttentionMixtureModel(VariantModel):
    """A model whose attention is a mixture."""

    prefix: ClassVar[str] = "AttentionMixture"

    def install(self: Any, **options: Any) -> None:
        """Widen every attention to `num_branches` experts, with keys and values in common if `shared_kv`.

        What is new is to be filled.
        """
        std = getattr(self.config, "initializer_range", 0.02)
        for module in list(self.modules()):
            if {"q_proj", "k_proj", "v_proj", "o_proj"} <= dict(module.named_children()).keys():
                _widen(module, options["num_branches"], options["shared_kv"], std)


class MixtureAttention(nn.Module):
    """Mixin of an attention with the heads of all experts."""

    prefix: ClassVar[str] = "MixtureAttentionOf"
    router: nn.Linear
    o_proj: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute all experts and their weighted sum.

        Args:
            hidden_states: [B, S, D].
        """
        self.o_proj.weights = self.router(hidden_states).float().softmax(-1).to(hidden_states.dtype)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.o_proj.weights = None


class WeighedProjection(nn.Module):
    """An output projection of heads that are weighed by the expert that they are of."""

    # [B, S, N], while the attention is computed.
    weights: torch.Tensor | None

    def __init__(self, linear: nn.Linear, groups: int) -> None:
        super().__init__()
        self.linear, self.groups, self.weights = linear, groups, None

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Return the mixture [B, S, D] of heads [B, S, G N R]."""
        weights = cast(torch.Tensor, self.weights)
        heads = heads.unflatten(-1, (self.groups, weights.shape[-1], -1)) * weights[..., None, :, None]
        return self.linear(heads.flatten(-3))


class BranchNorms(nn.Module):
    """Norms of queries or keys, of each expert its own."""

    def __init__(self, norm: nn.Module, num_branches: int, groups: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_branches))
        self.groups = groups

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Norm heads [B, S, G N R, d], each head by itself, or [B, S, G N R], all of an expert together."""
        apart, count = heads.dim() == 4, len(self.branches)
        if apart:
            parts = heads.unflatten(2, (self.groups, count, -1)).unbind(3)
            normed = [norm(part) for norm, part in zip(self.branches, parts, strict=True)]
            return torch.stack(normed, dim=3).flatten(2, 4)
        parts = heads.unflatten(2, (self.groups, count, -1)).unbind(3)
        normed = [norm(part.flatten(2)).view_as(part) for norm, part in zip(self.branches, parts, strict=True)]
        return torch.stack(normed, dim=3).flatten(2)


def _widen(attention: Any, num_branches: int, shared_kv: bool, std: float) -> None:
    """Give an attention the heads of N experts, and a router."""
    groups = attention.k_proj.out_features // attention.head_dim
    own = ["q_proj"] if shared_kv else ["q_proj", "k_proj", "v_proj"]
    for name in own:
        linear = getattr(attention, name)
        setattr(attention, name, _linear(linear, linear.in_features, num_branches * linear.out_features))
    output = attention.o_proj
    wide = _linear(output, num_branches * output.in_features, output.out_features)
    attention.o_proj = WeighedProjection(wide, groups)
    for name in ("q_norm", "k_norm"):
        if name in dict(attention.named_children()) and f"{name[0]}_proj" in own:
            setattr(attention, name, BranchNorms(getattr(attention, name), num_branches, groups))
    attention.router = _linear(output, output.out_features, num_branches)
    if not attention.router.weight.is_meta:
        nn.init.normal_(attention.router.weight, std=std)
    if shared_kv:
        attention.num_key_value_groups *= num_branches
    attention.__class__ = subclass(MixtureAttention, type(attention))


def _linear(like: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=like.weight.device, dtype=like.weight.dtype)


def stacked(parts: list[torch.Tensor], groups: int, dim: int) -> torch.Tensor:
    """Return the weights of experts as that of all, in the order of their heads along `dim`."""
    return torch.stack([part.unflatten(dim, (groups, -1)) for part in parts], dim=dim + 1).flatten(dim, dim + 2)


def __getattr__(name: str) -> type[Any]:
    return generated_in((AttentionMixtureModel, MixtureAttention), name)
