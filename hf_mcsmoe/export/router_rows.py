"""The rows of a plain router: what the rows of a group's experts become."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from hf_mcsmoe.export.form import Slots
from hf_mcsmoe.layers.layer import MoELayer

# By which weights the rows of a group's experts become one. With the last, a bias of log n follows.
ROUTER_ROWS = ("frequency", "dominant", "mean", "logsumexp")
# What a bias that is added to a router's logits is called beside their matrix.
BIAS = "bias"


def check_router_rows(name: str) -> None:
    """Raise ValueError where no rows are called so."""
    if name not in ROUTER_ROWS:
        raise ValueError(f"router_rows={name!r} is none of {', '.join(ROUTER_ROWS)}.")


def row_weights(slots: Slots, router_rows: str, planned: Mapping[str, Any]) -> torch.Tensor:
    """Return the weights of the router's rows in those of the places, float64 [G, E], 1 in each row.

    Args:
        planned: what the plan says of the layer: `counts`, the picks of each expert, and `dominant`.

    Raises:
        ValueError: the plan does not say what is asked for.
    """
    weights = torch.zeros(len(slots.rows), slots.layer.num_routed, dtype=torch.float64)
    given = _given(slots, router_rows, planned) if slots.is_combined else torch.ones(slots.layer.num_routed)
    for place, rows in enumerate(slots.rows):
        values = given[rows].double()
        # A group that no token reached is averaged.
        weights[place, rows] = values / values.sum() if values.sum() > 0 else 1 / len(rows)
    return weights


def _given(slots: Slots, router_rows: str, planned: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight of each of the router's rows, up to a factor, [E]."""
    if router_rows in ("mean", "logsumexp"):
        return torch.ones(slots.layer.num_routed)
    key = "counts" if router_rows == "frequency" else "dominant"
    if not planned.get(key):
        raise ValueError(
            f"router_rows={router_rows!r} needs the {key} of {slots.layer.original_name}, of which no plan lies "
            "beside the model (mcsmoe_plan.json): choose router_rows='mean'."
        )
    if key == "counts":
        return torch.tensor(planned[key])
    return torch.zeros(slots.layer.num_routed).index_fill(0, torch.tensor(planned[key]), 1)


def combined(tensor: torch.Tensor, like: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a router with G entries for E, along the axis in which it differs from `like`.

    Entries behind those of the experts stay as they are.

    Raises:
        ValueError: it differs in another way.
    """
    places, routed = weights.shape
    shapes = zip(tensor.shape, like.shape, strict=False)
    axes = [axis for axis, (old, new) in enumerate(shapes) if old - new == routed - places]
    same = [old == new for old, new in zip(tensor.shape, like.shape, strict=False)].count(False)
    if tensor.ndim != like.ndim or same != 1 or len(axes) != 1 or not tensor.is_floating_point():
        raise ValueError(f"it is {list(tensor.shape)}, and {list(like.shape)} in a model of so many experts")
    moved = tensor.detach().movedim(axes[0], 0)
    rows = torch.tensordot(weights.to(moved.device), moved[:routed].double(), 1).to(tensor.dtype)
    return torch.cat([rows, moved[routed:]]).movedim(0, axes[0])


def group_bias(slots: Slots) -> torch.Tensor:
    """Return log n of the places, float64 [G]: what n equal logits are more than one of them."""
    return torch.tensor([math.log(len(rows)) for rows in slots.rows], dtype=torch.float64)


def bias_name(layer: MoELayer) -> str:
    """Return the name in the model of the bias that is added to the router logits of a layer in its plain form.

    Raises:
        ValueError: there is none.
    """
    path = layer.router_rows
    owner = path.rpartition(".")[0] if path else ""
    router = layer.model.get_submodule(owner) if path else None
    bias = router._parameters.get(BIAS) if router is not None else None
    if bias is None or bias.shape != (layer.num_routed,):
        raise ValueError(
            f"router_rows='logsumexp' adds log n to the logit of a group of n, and the router of {layer.name} "
            "has no bias to hold it: choose router_rows='frequency'."
        )
    return f"{owner}.{BIAS}"
