"""The hidden units of experts: their weights side by side, and what they make of the layer's sample."""

from collections.abc import Sequence

import torch

from hf_mcsmoe.methods.experts import HIDDEN_AXES, Expert
from hf_mcsmoe.methods.view import LayerView

# Tokens below which those that reached some experts tell too little of their units: then all of the sample do.
FEW = 32
# By role, the weights of n hidden units in rows: [n, D] of a matrix, [n] of a bias. `down_bias` belongs to none.
Units = dict[str, torch.Tensor]


def units_of(expert: Expert) -> Units:
    """Return the weights of an expert's hidden units, in rows of float32 or higher."""
    rows = {
        role: tensor.movedim(axis, 0) for role, tensor in expert.items() if (axis := HIDDEN_AXES[role]) is not None
    }
    return {role: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for role, tensor in rows.items()}


def side_by_side(parts: Sequence[Units]) -> Units:
    """Return the units of several experts as those of one wide expert."""
    return {role: torch.cat([part[role] for part in parts]) for role in parts[0]}


def expert_of(units: Units, view: LayerView, members: Sequence[int], shares: Sequence[float]) -> Expert:
    """Return the expert of these units; its output has the weighted mean of the members' biases, where they have any.

    Args:
        units: F of them.
        shares: weights of the members.
    """
    expert = {role: rows.movedim(0, HIDDEN_AXES[role] or 0) for role, rows in units.items()}
    biases = [
        (view.experts.expert(member).get("down_bias"), share) for member, share in zip(members, shares, strict=True)
    ]
    total = sum(bias.float() * share for bias, share in biases if bias is not None)
    return expert | ({"down_bias": total} if isinstance(total, torch.Tensor) else {})


def tokens_of(view: LayerView, members: Sequence[int]) -> torch.Tensor:
    """Return the inputs [n, D] in the sample that reached any of some experts; all of them where those are few."""
    rows = view.sample.per_input()
    reached = (rows.reached & torch.isin(rows.index, torch.tensor(members, device=rows.index.device))).any(1)
    return rows.hidden[reached] if reached.sum() >= FEW else rows.hidden


def standardised(units: torch.Tensor) -> torch.Tensor:
    """Return what units [n, F] are for n tokens, with mean 0 and norm 1 over these; zeros where one never varies."""
    centred = units - units.mean(0)
    return torch.nan_to_num(centred / centred.norm(dim=0))
