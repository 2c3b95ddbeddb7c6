"""Experts merged unit by unit: hidden units of all members are matched by correlation, and matched ones averaged."""

import torch

from hf_mcsmoe.methods.clustering import linked
from hf_mcsmoe.methods.experts import Expert
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.units import Units, expert_of, side_by_side, standardised, tokens_of, units_of
from hf_mcsmoe.methods.view import LayerView

# Less than any correlation: units that may not become one.
APART = -2.0


@MERGING.register("zipit", paper="2305.03053", needs=["sample"])
def zipit(view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]) -> Expert:
    """Return the expert of F merged units: the two most correlated of all members' units become one, again and again.

    Both may be of the same member, and `permutations` do not matter. See `_zipped`.
    """
    return _zipped(view, members, shares, across=True)


@MERGING.register("zipit_within", paper="2305.03053", needs=["sample"])
def zipit_within(
    view: LayerView, members: list[int], shares: list[float], permutations: list[torch.Tensor | None]
) -> Expert:
    """Return the expert of F merged units where only units of the same member become one; see `zipit`.

    What is left of every member stands side by side, its outputs weighted.
    """
    return _zipped(view, members, shares, across=False)


def _zipped(view: LayerView, members: list[int], shares: list[float], *, across: bool) -> Expert:
    """Return the members' weighted sum as an expert of F units.

    Rows of gate and up of units that become one are averaged by their shares. Their columns of down, times the shares,
    are summed, so that the output is what it was where the units are the same (the authors' code averages these as
    well, which loses half of what two like units of one expert add).
    """
    hidden = tokens_of(view, members)
    parts = [units_of(view.experts.expert(member)) for member in members]
    width = len(parts[0]["up"])
    states = torch.cat([view.experts.hidden(member, hidden) for member in members], 1)
    rows = standardised(states)
    correlations = rows.T @ rows
    if not across:
        owner = torch.arange(len(members), device=rows.device).repeat_interleave(width)
        correlations.masked_fill_(owner[:, None] != owner[None, :], APART)
    labels = matched(correlations, width)
    weights = torch.tensor(shares, device=rows.device).repeat_interleave(width)
    return expert_of(_united(side_by_side(parts), labels, weights, width), view, members, shares)


def matched(correlations: torch.Tensor, number: int) -> torch.Tensor:
    """Return which of `number` units each of n becomes, int [n]: greedily, the most correlated pair first.

    What two units became is as correlated with a third as the less alike of the two. (The published ways also take
    only a share of it, which keeps three like units of three experts from becoming one.) The results are numbered by
    their first unit.

    Args:
        correlations: [n, n].
    """
    distance = (1 - correlations.double().cpu()).clamp(min=0).fill_diagonal_(0)
    labels = linked(distance, number, "complete")
    places: dict[int, int] = {}
    return torch.tensor([places.setdefault(label, len(places)) for label in labels], device=correlations.device)


def _united(units: Units, labels: torch.Tensor, weights: torch.Tensor, width: int) -> Units:
    """Return the units that all of a label become: averages, and the weighted sum of what they add to the output."""
    mass = torch.zeros(width, dtype=weights.dtype, device=weights.device).index_add_(0, labels, weights)
    found: Units = {}
    for role, rows in units.items():
        scale = weights if role == "down" else weights / mass[labels]
        weighted = rows * scale.to(rows).view(-1, *(1 for _ in rows.shape[1:]))
        found[role] = torch.zeros_like(weighted[:width]).index_add_(0, labels, weighted)
    return found
