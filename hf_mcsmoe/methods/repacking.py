"""Experts merged by choosing the best of all their hidden units."""

import torch

from hf_mcsmoe.methods.experts import Expert
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.units import expert_of, side_by_side, tokens_of, units_of
from hf_mcsmoe.methods.view import LayerView

# How alike a unit must be to a chosen one to be added to it (DERN, whose best thresholds lie around it).
ALIKE = 0.4
# What is left of a unit's energy in float32 when others tell all of it.
ROUNDING = 1e-5


@MERGING.register("repacking", paper="2509.10377", needs=["sample"])
def repacking(
    view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return the expert of the F best of all members' hidden units; others are added to those that they are like.

    What a unit adds to the weighted sum of the members is `s w h(x)`, for its member's share s, its column w of down
    and its hidden state h. One after the other is chosen whose part, less what the chosen ones tell of it, has the
    most energy over the sample. Each of the others then goes to the chosen unit with the most like hidden states, if
    these are alike enough, which takes over its column times the factor between the two (DERN, from which the parts of
    pruned experts come here by weights; CAMERA, which chooses by energy). `permutations` do not matter.
    """
    by_share = sorted(range(len(members)), key=lambda place: -shares[place])  # whose units come first among equals
    members, shares = [members[place] for place in by_share], [shares[place] for place in by_share]
    hidden = tokens_of(view, members)
    units = side_by_side([units_of(view.experts.expert(member)) for member in members])
    states = torch.cat([view.experts.hidden(member, hidden) for member in members], 1)
    width = states.shape[1] // len(members)
    weights = torch.tensor(shares, device=states.device).to(states).repeat_interleave(width)
    columns = units["down"] * weights[:, None]
    chosen = _chosen(states, columns, width)
    packed = {role: rows[chosen] for role, rows in units.items()}
    packed["down"] = _received(states, columns, chosen)
    return expert_of(packed, view, members, shares)


def _chosen(states: torch.Tensor, columns: torch.Tensor, number: int) -> torch.Tensor:
    """Return the units int [number], rising, that a pivoted Cholesky factorisation of their products takes first.

    The product of two units' parts of the output, summed over tokens, is that of their states times that of their
    columns.

    Args:
        states: [n, m] of m units for n tokens.
        columns: [m, D].
    """
    left = energy = states.square().sum(0) * columns.square().sum(1)
    factor, chosen = states.new_zeros(len(columns), number), []
    for step in range(number):
        pivot = int(left.argmax())
        chosen.append(pivot)
        product = (states.T @ states[:, pivot]) * (columns @ columns[pivot])
        row = product - factor[:, :step] @ factor[pivot, :step]
        if left[pivot] > 0:
            factor[:, step] = row / left[pivot].sqrt()
        left = left - factor[:, step].square()
        left[left < ROUNDING * energy] = 0
        left[chosen] = -1
    return torch.tensor(sorted(chosen), device=states.device)


def _received(states: torch.Tensor, columns: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the columns [F, D] of the chosen units with what the others leave to them."""
    kept = states[:, chosen]
    scale = states.norm(dim=0)
    alike = torch.nan_to_num((kept.T @ states) / kept.norm(dim=0)[:, None] / scale)  # [F, m]
    alike[:, chosen] = 0
    cosine, place = alike.abs().max(0)
    factor = torch.nan_to_num(alike.gather(0, place[None])[0] * scale / kept.norm(dim=0)[place])
    left = columns * (factor * (cosine >= ALIKE))[:, None]
    return columns[chosen].index_add(0, place, left)
