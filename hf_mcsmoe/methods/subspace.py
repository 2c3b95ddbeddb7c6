"""Experts merged in the directions that all members share."""

import torch

from hf_mcsmoe.methods.experts import HIDDEN_AXES, Expert
from hf_mcsmoe.methods.merging import MERGING, average
from hf_mcsmoe.methods.view import LayerView


@MERGING.register("svd", paper="2506.23266")
def svd(view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]) -> Expert:
    """Return the members' weighted mean in their common directions: `U S (sum_i s_i V_i)^T` (Sub-MoE, section 3.3).

    `[W_1, ..., W_n] = U S [V_1, ..., V_n]^T` is one decomposition for all members of a matrix, side by side, with U in
    the space of the model's width. As many directions are kept as one expert has, min(D, F); with all of them it is
    the weighted mean of the W_i themselves, and so it is where experts are wider than the model. Biases are averaged.
    """
    merged = average(view, members, shares, permutations)
    experts = [view.experts.expert(member) for member in members]
    for role in ("gate", "up", "down"):
        if role in merged:
            axis = HIDDEN_AXES[role] or 0
            parts = [expert[role].movedim(axis, 0).double() for expert in experts]  # [F, D]; their order says nothing
            merged[role] = _projected(merged[role].movedim(axis, 0), torch.cat(parts)).movedim(0, axis)
    return merged


def _projected(mean: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return a mean [F, D] in the min(D, F) directions [D] that hold most of all parts [n * F, D]."""
    width, model_width = mean.shape
    if width >= model_width:
        return mean
    directions = torch.linalg.eigh(parts.mT @ parts).eigenvectors[:, -width:]  # [D, F], rising
    return ((mean.double() @ directions) @ directions.T).to(mean)
