"""Pruned layers: a router cut to the experts that are left. This file travels with every checkpoint.

A cut router is the family's own with G experts, and routes as the family does over these. Only where the family's loss
of load balancing joins the logits of all layers are they filled up to E again, with -inf.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .router_mcsmoe import is_jetmoe, router_beside

# Attributes that count the experts, and those that count them with others behind them (that are shared, or none).
TOTALS = ("n_routed_experts", "n_total_experts", "num_router_classes")
COUNTS = ("num_experts", "out_features", *TOTALS)
GROUPS, TOP_K = ("num_group", "n_group"), ("top_k", "num_experts_per_tok")
# Stands in the names of the classes of cut routers.
CUT = "Cut"
# Where routers whose first output is something else return their logits.
LOGITS = {"SwitchTransformersTop1Router": 2, "JetMoeTopKGating": -1}


class CutRouter(nn.Module):
    """First base of the cut routers of families that join the logits of layers: these keep E columns."""

    num_cut: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Route as the library's class does; the logits of experts that are gone are -inf, and come last."""
        output = super().forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return self._filled(output)
        outputs = list(output)
        place = next((LOGITS[cls.__name__] for cls in type(self).__mro__ if cls.__name__ in LOGITS), 0)
        outputs[place] = self._filled(outputs[place])
        return tuple(outputs)

    def _filled(self, logits: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(logits, (0, self.num_cut), value=float("-inf"))


def joins_logits(router: nn.Module) -> bool:
    """Tell whether the family of a router joins the logits of all layers in a loss of load balancing."""
    return hasattr(sys.modules[type(router).__module__], "load_balancing_loss_func")


def cut_of(model: nn.Module, path: str) -> Any:
    """Return the cut router of the experts at `path`; None where the router is whole, or none is found."""
    for parent in (path, path.rpartition(".")[0]):
        for module in model.get_submodule(parent).children():
            if "kept_experts" in vars(module):
                return module
    return None


def cut_routers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the cut routers of a model, each once, and their paths."""
    for path, module in model.named_modules():
        if "kept_experts" in vars(module):
            yield path, module


def check_cut(model: nn.Module, path: str, num_experts: int, kept: Sequence[int]) -> None:
    """Check that the router of the experts at `path` can do with the experts `kept` alone.

    Raises:
        ValueError: it picks more experts than these, its groups would be left uneven or too small, or what it picks is
            fixed beforehand.
    """
    least, groups = cut_limits(model, path)
    if len(kept) < least:
        raise ValueError(
            f"{path} cannot be pruned to {len(kept)} experts: its router needs {least} of them at least; keep more."
        )
    sizes = [sum(expert * groups // num_experts == group for expert in kept) for group in range(groups)]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{path} cannot be pruned to {list(kept)}: its router picks among {groups} groups of experts, of which "
            f"{sizes} would be left; keep the same number of each."
        )


def cut_limits(model: nn.Module, path: str) -> tuple[int, int]:
    """Return how few experts the router at `path` can do with, and the number of groups it keeps alike.

    Raises:
        ValueError: the router cannot be cut.
    """
    router, block = router_beside(model, path), model.get_submodule(path.rpartition(".")[0])
    if "tid2eid" in router._buffers:
        raise ValueError(
            f"{path} cannot be pruned: its router ({type(router).__name__}) sends each token of the vocabulary to "
            "fixed experts, and nothing says where those of one that is gone should go; merge the layer, or skip it."
        )
    top_k = next((vars(owner)[name] for owner in (router, block) for name in TOP_K if name in vars(owner)), 1)
    groups = next((vars(router)[name] for name in GROUPS if vars(router).get(name)), None)
    if groups is None or vars(router).get("topk_method") == "greedy":
        return top_k, 1
    # A group is judged by its two best experts.
    in_group = max(2, -(-top_k // vars(router)["topk_group"]))
    return groups * in_group, groups


def cut_tensors(model: nn.Module, path: str, num_experts: int) -> list[tuple[nn.Module, str, int]]:
    """Return the tensors beside the experts at `path` that have an entry per expert: owner, name and that axis.

    A few families keep the correction of their router in its block.
    """
    router = router_beside(model, path)
    block = [] if is_jetmoe(model.get_submodule(path)) else [model.get_submodule(path.rpartition(".")[0])]
    lengths = _lengths(router, num_experts)
    found = []
    for module in (*router.modules(), *block):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name != "expert_map" and (axis := _axis(tensor, lengths)) is not None:
                found.append((module, name, axis))
    return found


def _lengths(router: nn.Module, num_experts: int) -> set[int]:
    return {num_experts, *(vars(router)[name] for name in TOTALS if name in vars(router))}


def _axis(tensor: torch.Tensor, lengths: set[int]) -> int | None:
    if tensor.ndim and tensor.shape[0] in lengths:
        return 0
    return 1 if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] in lengths else None


def kept_entries(tensor: torch.Tensor, axis: int, num_experts: int, kept: Sequence[int]) -> torch.Tensor:
    """Return a tensor's entries along `axis` of the kept experts, and those that stand behind the experts."""
    entries = [*kept, *range(num_experts, tensor.shape[axis])]
    return tensor.detach().index_select(axis, torch.tensor(entries, device=tensor.device))


def cut_router(model: nn.Module, path: str, num_experts: int, kept: Sequence[int]) -> Any:
    """Leave in the router of the experts at `path`, in place, what belongs to the experts `kept`; returns it.

    The caller gives it its class; see `CutRouter`.
    """
    router, block = router_beside(model, path), model.get_submodule(path.rpartition(".")[0])
    lengths, gone = _lengths(router, num_experts), num_experts - len(kept)
    for module, name, axis in cut_tensors(model, path, num_experts):
        tensor = (module._parameters | module._buffers)[name]
        set_tensor(module, name, kept_entries(tensor, axis, num_experts, kept))
    for module in (*router.modules(), block):
        for name in COUNTS:
            if isinstance(count := vars(module).get(name), int) and count in lengths:
                setattr(module, name, count - gone)
    if (config := vars(router).get("config")) is not None:  # read in the forward (Zaya)
        router.config = copy.copy(config)
        router.config.num_experts = len(kept)
    router.kept_experts, router.num_cut = list(kept), gone
    return router


def set_tensor(module: nn.Module, name: str, values: torch.Tensor) -> None:
    """Let a parameter or a buffer of `module` hold `values`, whatever their shape."""
    if name in module._buffers:
        module._buffers[name] = values
    else:
        module._parameters[name] = nn.Parameter(values, module._parameters[name].requires_grad)
