"""Which experts of a layer are worth more bits than others."""

from dataclasses import replace

import torch

from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.router_norm import CHANGE
from hf_mcsmoe.modeling.forward_mcsmoe import expert_hidden, expert_output
from hf_mcsmoe.repair.fit import CHUNK, LayerFit

# Importance [G] of the stored experts of a `LayerFit`.
IMPORTANCE = Registry("importance")


@IMPORTANCE.register("contribution")
def contribution(layer: LayerFit) -> torch.Tensor:
    """Return the sum over an expert's tokens of gate times norm of its output, float64 [G]."""
    sums = torch.zeros(layer.experts.num_experts, dtype=torch.float64)
    for expert in range(len(sums)):
        token, gates = layer.tokens_of(expert)
        for part in torch.arange(len(token)).split(CHUNK):
            states = layer.inputs.hidden[token[part]].to(layer.device)
            output = expert_output(layer.experts, expert_hidden(layer.experts, states, expert), expert)
            sums[expert] += (output.double().norm(dim=1).cpu() * gates[part].double().abs().cpu()).sum()
    return sums


@IMPORTANCE.register("frequency")
def frequency(layer: LayerFit) -> torch.Tensor:
    """Return how many tokens reach each expert, float64 [G]."""
    return torch.bincount(layer.picks.flatten(), minlength=layer.experts.num_experts + 1)[:-1].double()


@IMPORTANCE.register("router_norm_change", paper="2604.06515", needs=[CHANGE])
def router_norm_change(layer: LayerFit) -> torch.Tensor:
    """Return how much shorter the router's row of an expert has become since a reference checkpoint, float64 [G].

    The smaller the change, the more bits: what such an expert learned is rare, and rounding costs the more. To prune,
    the same change counts the other way round. Of merged experts the smallest change counts.
    """
    change = layer.sums[CHANGE]
    return torch.stack([-change[members].min() for members in layer.members])


def grids_by_importance(grid: Grid, low_bits: int, low_share: float, importance: torch.Tensor) -> list[Grid]:
    """Return a grid for each expert: the least important share of them have fewer bits, of equals the later ones.

    At least one expert has the bits of `grid`.

    Args:
        importance: [G].
    """
    order = importance.argsort(descending=True, stable=True).tolist()
    low = set(order[max(1, len(order) - round(low_share * len(order))) :])
    return [replace(grid, bits=low_bits) if expert in low else grid for expert in range(len(order))]
