"""Bits shared out among the experts of a layer and their two matrices, by what the error of each one costs."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.forward_mcsmoe import expert_hidden, expert_output, low_rank_of
from hf_mcsmoe.quantization.layer import Rounding, hidden_of, inputs_of, weight_names
from hf_mcsmoe.quantization.packing import expert_bytes
from hf_mcsmoe.repair.fit import CHUNK, LayerFit

# How values are rounded to see what bits cost: of a better way all of them have less, and about as much less.
METHOD = "nearest"
# Experts that hardly any token reaches may be needed elsewhere: so much of the average error is added to each one's.
FLOOR = 0.05
# Halvings of the price of a byte, which is looked for between the dearest and nothing.
HALVINGS = 60


@dataclass(frozen=True)
class Balanced:
    """Grids for each expert, and the share of the squared error that they leave of what equal bits would miss."""

    w_in: list[Grid]
    w_out: list[Grid]
    gain: float = 1.0


@torch.no_grad()
def balanced_grids(layer: LayerFit, w_in: Grid, w_out: Grid, bits: Sequence[int], method: str = METHOD) -> Balanced:
    """Return grids of W_in and of W_out for each expert that err least in the bytes that the given ones take.

    Experts that many tokens reach with large gates get more bits, others fewer. What the matrices of different experts
    miss is taken to add up. Low rank + sparse experts keep the grids given.

    Args:
        w_in: grid that all experts would have; its groups are kept.
        bits: those that may be chosen, beside those of the grids given.
        method: of `ROUNDING`.
    """
    count, numbers = layer.experts.num_experts, sorted({w_in.bits, w_out.bits, *bits})
    equal = Balanced([w_in] * count, [w_out] * count)
    if low_rank_of(layer.experts) or len(numbers) < 2:
        return equal
    grids = [[replace(grid, bits=number) for number in numbers] for grid in (w_in, w_out)]
    errors = torch.cat([_errors(layer, side, own, method) for side, own in enumerate(grids)])  # float64 [2 G, bits]
    sizes = torch.tensor([[_bytes(layer, side, grid) for grid in own] for side, own in enumerate(grids)]).double()
    sizes = sizes.repeat_interleave(count, 0)
    given = torch.tensor([numbers.index(grid.bits) for grid in (w_in, w_out)]).repeat_interleave(count)
    picks = shared_out(errors, sizes, _total(sizes, given))
    if picks is None or not _total(errors, picks) < _total(errors, given):
        return equal
    first, second = (part.tolist() for part in picks.split(count))
    gain = _total(errors, picks) / _total(errors, given)
    return Balanced([grids[0][pick] for pick in first], [grids[1][pick] for pick in second], gain)


def _total(values: torch.Tensor, picks: torch.Tensor) -> float:
    return float(values.gather(1, picks[:, None]).sum())


def shared_out(errors: torch.Tensor, sizes: torch.Tensor, limit: float) -> torch.Tensor | None:
    """Return for each item which of its choices it takes, int [N]: the least error in all for `limit` bytes.

    Found by one price of a byte for all (Lagrange); None where no price keeps to the limit.

    Args:
        errors: float64 [N, choices], of all units.
        sizes: float64 [N, choices], bytes.
    """
    scale = errors.max().clamp(min=torch.finfo(torch.float64).tiny)
    low, high, best = -30.0, 30.0, None  # logarithms of a price for the average item
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        picks = (errors / scale + 10**middle * sizes / sizes.mean()).argmin(1)
        if _total(sizes, picks) <= limit:
            best, high = picks, middle
        else:
            low = middle
    return best


def _errors(layer: LayerFit, side: int, grids: Sequence[Grid], method: str) -> torch.Tensor:
    """Return by how much rounding W_in (side 0) or W_out (1) alone moves gated outputs, squared, [G, grids]."""
    name, states = weight_names(layer.experts)[side], (inputs_of, hidden_of)[side]
    errors = torch.zeros(layer.experts.num_experts, len(grids), dtype=torch.float64)
    for column, grid in enumerate(grids):
        rounded = copy.deepcopy(layer.experts)
        Rounding(rounded, method).weight(name, grid, lambda expert: states(layer, expert))
        for expert in range(len(errors)):
            errors[expert, column] = _missed(layer, rounded, expert)
    return errors + FLOOR * errors.mean(0)


def _missed(layer: LayerFit, rounded: Any, expert: int) -> float:
    token, gates = layer.tokens_of(expert)
    missed = 0.0
    for part in torch.arange(len(token)).split(CHUNK):
        states = layer.inputs.hidden[token[part]].to(layer.device)
        outputs = [
            expert_output(experts, expert_hidden(experts, states, expert), expert)
            for experts in (layer.experts, rounded)
        ]
        difference = (outputs[1] - outputs[0]).float() * gates[part].to(layer.device).float()[:, None]
        missed += float(difference.square().sum())
    return missed


def _bytes(layer: LayerFit, side: int, grid: Grid) -> int:
    return expert_bytes(matrix_shape(layer.experts, weight_names(layer.experts)[side]), grid, torch.float32)


def matrix_shape(experts: Any, name: str) -> tuple[int, int]:
    """Return (out, in) of the matrices of a dense weight."""
    *_, first, second = getattr(experts, name).shape
    return (second, first) if experts.is_transposed else (first, second)
