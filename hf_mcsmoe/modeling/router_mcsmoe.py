"""The expert map, where a router's picks become stored experts. This file travels with every checkpoint.

The map belongs to the router's output: the experts behind it are then the family's own class with G experts, which any
engine may replace by its own kernels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class ExpertMap(nn.Module):
    """First base of the modules that send a router's picks to the stored experts: int [E] -> [G].

    The map is kept in the configuration, not among the weights; `expert_map_values` is what the buffer must hold.
    """

    expert_map: torch.Tensor
    expert_map_values: list[int]

    def set_expert_map(self, expert_map: list[int], device: torch.device | None = None) -> None:
        """Set the map."""
        self.expert_map_values = list(expert_map)
        values = torch.tensor(expert_map, dtype=torch.long, device=device)
        self.register_buffer("expert_map", values, persistent=False)

    def restore_map(self) -> None:
        """Write the map into its buffer again, which a load or `to_empty` may have left as it found the memory."""
        if not self.expert_map.is_meta:
            self.set_expert_map(self.expert_map_values, self.expert_map.device)

    def stored(self, index: torch.Tensor) -> torch.Tensor:
        """Return the stored experts of picks in [0, E), both int [T, K]."""
        if self.expert_map.device != index.device:  # on the meta device, where a load takes weights only
            self.set_expert_map(self.expert_map_values, index.device)
        return self.expert_map[index]

    def _apply(self, *args: Any, **kwargs: Any) -> "ExpertMap":
        super()._apply(*args, **kwargs)
        self.restore_map()
        return self


class MappedRouter(ExpertMap):
    """Router that returns logits, weights, stored experts and whatever else its library class returns."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Route as the library's class does."""
        logits, weights, index, *others = super().forward(*args, **kwargs)
        return logits, weights, self.stored(index), *others


class MappedLongcatFlashRouter(MappedRouter):
    """Router of LongCat-Flash: picks from E on, its zero-computation experts, become those from G on."""

    def stored(self, index: torch.Tensor) -> torch.Tensor:
        """Return the stored experts of picks in [0, E), and G + z of picks E + z."""
        experts = len(self.expert_map_values)
        beyond = index - experts + max(self.expert_map_values) + 1
        return torch.where(index < experts, super().stored(index.clamp(max=experts - 1)), beyond)


class MappedDbrxFFN(ExpertMap):
    """DBRX's block, which picks the experts itself; its router returns nothing but logits."""

    def route_tokens_to_experts(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights and the stored experts, both [T, K]."""
        weights, index = super().route_tokens_to_experts(router_logits)
        return weights, self.stored(index)


# By the class of the library; all others are routers that return (logits, weights, index, ...).
MAPPED = {"LongcatFlashTopkRouter": MappedLongcatFlashRouter, "DbrxFFN": MappedDbrxFFN}


def unmapped(model: nn.Module, path: str) -> nn.Module:
    """Return the module beside the experts at `path` that is to map: the router, or DBRX's block."""
    block = model.get_submodule(path.rpartition(".")[0])
    if type(block).__name__ in MAPPED:
        return block
    return router_beside(model, path)


def router_beside(model: nn.Module, path: str) -> Any:
    """Return the router of the experts at `path`, merged ones or not."""
    container = model.get_submodule(path)
    block = container if is_jetmoe(container) else model.get_submodule(path.rpartition(".")[0])
    return block.gate if hasattr(block, "gate") else block.router


def is_jetmoe(container: nn.Module) -> bool:
    """Tell whether a container of experts, merged or not, is the whole block of JetMoE."""
    return type(container).__name__ in ("JetMoeMoE", "MergedJetMoeMoE")


def map_of(model: nn.Module, path: str) -> Any:
    """Return the module that maps the picks for the experts at `path`: itself, its block or its router; None without.

    Known by its buffer: a model loaded through remote code has classes of its own copy of this file.
    """
    block = model.get_submodule(path.rpartition(".")[0])
    modules = (model.get_submodule(path), block, *block.children())
    return next((module for module in modules if "expert_map" in module._buffers), None)


def expert_maps(model: nn.Module) -> Iterator[tuple[str, ExpertMap]]:
    """Yield the modules that map, each once, and their paths."""
    for path, module in model.named_modules():
        if "expert_map" in module._buffers:
            yield path, module


def restore_maps(model: nn.Module) -> None:
    """Let every map of a model hold what its configuration says."""
    for _, module in expert_maps(model):
        module.restore_map()
