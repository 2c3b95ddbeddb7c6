"""Where a dense model has its MLPs, and what their projections are. This file travels with checkpoints."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

# How families call an MLP's projections: gate, up, down.
LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def dense_mlps(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield the MLPs in the layers of a model: the module around each, its name in there, itself."""
    for path, module in model.named_modules():
        # Not those inside of experts, nor a head's.
        if "experts" in path.split(".") or not any(part.isdigit() for part in path.split(".")):
            continue
        for name, child in module.named_children():
            if not name.isdigit() and "expert" not in name and _layout(child) and activation(child, missing=None):
                yield module, name, child


def projections(mlp: nn.Module) -> tuple[Any, Any, Any]:
    """Return the modules of an MLP: gate, which may be None, up and down."""
    children: dict[str | None, Any] = {None: None, **dict(mlp.named_children())}
    gate, up, down = cast(tuple[str | None, str, str], _layout(mlp))
    return children[gate], children[up], children[down]


def activation(mlp: nn.Module, **default: Any) -> Any:
    """Return the function between an MLP's projections."""
    members = {**vars(mlp), **dict(mlp.named_children())}
    found = [members[name] for name in ACTIVATIONS if name in members]
    return found[0] if found else default["missing"]


def matrix(projection: Any) -> torch.Tensor:
    """Return a weight as [out, in], which GPT-2 keeps the other way round."""
    return projection.weight.T if type(projection).__name__ == "Conv1D" else projection.weight


def _layout(mlp: nn.Module) -> tuple[str | None, str, str] | None:
    names = {name for name, child in mlp.named_children() if len(getattr(child, "weight", torch.empty(0)).shape) == 2}
    return next((layout for layout in LAYOUTS if {name for name in layout if name} == names), None)
