"""Bringing hidden neurons into order by what they are for the same tokens."""

import torch

from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.assignment import assigned
from hf_mcsmoe.methods.units import standardised, tokens_of, units_of
from hf_mcsmoe.methods.view import LayerView


@ALIGNMENT.register("activation_matching", paper="2209.04836", needs=["sample"])
def activation_matching(view: LayerView, reference: int, expert: int) -> torch.Tensor | None:
    """Return the permutation int [F] with the largest sum of correlations of neurons: one exact assignment.

    They are those of the hidden states of both experts over the tokens of the sample that reached either, or over all
    of it where these are few (Git Re-Basin, section 3.1).
    """
    return assigned(_correlations(view, reference, expert).neg_())


@ALIGNMENT.register("activation_weight_matching", paper="2604.04356", needs=["sample"])
def activation_weight_matching(view: LayerView, reference: int, expert: int) -> torch.Tensor | None:
    """Return the permutation int [F] with the smallest sum of distances of hidden states and of weights (REAM).

    A neuron's distance to another is that of their hidden states over the sample, scaled to norm 1, and that of all
    their weights, gate, up and down, scaled to norm 1 (where the released code takes 64 principal components).
    """
    hidden = tokens_of(view, [reference, expert])
    states = [view.experts.hidden(number, hidden).T for number in (reference, expert)]
    weights = [_rows(view, number) for number in (reference, expert)]
    return assigned(_distances(states).add_(_distances(weights)))


def _rows(view: LayerView, number: int) -> torch.Tensor:
    units = units_of(view.experts.expert(number))
    return torch.cat([units[role] for role in ("gate", "up", "down") if role in units], 1)


def _distances(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the distances [F, F] between the rows [F, n] of two experts, scaled to norm 1."""
    one, other = (torch.nn.functional.normalize(part, dim=1) for part in rows)
    return torch.cdist(one, other)


def _correlations(view: LayerView, reference: int, expert: int) -> torch.Tensor:
    hidden = tokens_of(view, [reference, expert])
    one, other = (standardised(view.experts.hidden(number, hidden)) for number in (reference, expert))
    return one.T @ other
