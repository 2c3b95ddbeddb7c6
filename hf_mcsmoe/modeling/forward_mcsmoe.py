"""How merged experts compute: one after another, or by grouped products. This file travels with every checkpoint."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations import moe

from .losparse_mcsmoe import Factors
from .quantized_mcsmoe import QuantizedMatrix, quantized_of

# Our experts implementation, the default of merged models: the name for `set_experts_implementation`.
IMPLEMENTATION = "mcsmoe"

# Grouped products want rows of a multiple of 16 bytes: 8 values of bfloat16.
ALIGNMENT = 8
# Products that are launched for the kept rows of S of one weight, beyond which some rows of zeros are cheaper.
MAX_LEVELS = 8


def merge_picks(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one pick of those of a token that meet in a stored expert.

    The first of them carries the sum of their weights (`g_1 + g_2` times the merged expert). The others, and picks
    whose weight is 0 (a token over capacity, a skipped expert), get the index `num_experts`, which is never computed.

    Args:
        index: int [T, K], stored experts.
        weights: [T, K].
        num_experts: G.
    """
    index = index.masked_fill(weights == 0, num_experts)
    if index.shape[-1] == 1:
        return index, weights
    same = index[:, :, None] == index[:, None, :]  # [T, K, K]
    repeated = same.tril(-1).any(-1)  # [T, K]
    summed = (same * weights[:, None, :]).sum(-1, dtype=weights.dtype)
    return index.masked_fill(repeated, num_experts), summed.masked_fill(repeated, 0)


def merged_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run stacked experts, each once for a token however many of the token's picks meet in it.

    What other implementations of the experts interface compute, which run an expert once for each pick. For dense
    experts of every layout, and for those stored as low rank + sparse or in few bits.

    Args:
        hidden_states: [T, D].
        top_k_index: int [T, K], stored experts; an index of `num_experts` means no expert.
        top_k_weights: [T, K].
    """
    quantized = bool(quantized_of(self))
    # Tensors of a class of their own (of other quantizers) know how to be multiplied, but not in a grouped product.
    plain = quantized or low_rank_of(self) or type(self.down_proj) in (torch.Tensor, nn.Parameter)
    if not getattr(self, "picks_meet", False):  # a layer that was left whole computes as in the original
        original = moe.grouped_mm_experts_forward if plain else eager_experts_forward
        return original(self, hidden_states, top_k_index, top_k_weights)
    index, weights = merge_picks(top_k_index, top_k_weights, self.num_experts)
    # A loop over experts breaks a graph, and means many small launches on an accelerator; the CPU is faster so.
    # Quantized experts are looped over anyway, which one loop does with one look at the counts.
    is_faster = quantized or hidden_states.device.type == "cpu"
    looped = not plain or (is_faster and not torch.compiler.is_compiling())
    product = eager_experts_forward if looped else grouped_experts_forward
    return product(self, hidden_states, index, weights)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, merged_experts_forward)


def low_rank_of(experts: nn.Module) -> dict[str, dict]:
    """Return what of the experts is stored as low rank + sparse: nothing of the library's own experts."""
    return getattr(experts, "low_rank", {})


def eager_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run stacked experts one after another, for every layout of the experts interface of Transformers.

    Args:
        hidden_states: [T, D].
        top_k_index: int [T, K]; the index `num_experts` means no expert.
        top_k_weights: [T, K].
    """
    output = torch.zeros_like(hidden_states)
    flat, weights = top_k_index.flatten(), top_k_weights.flatten()
    # Sorted once; within an expert the picks stay in the order of the tokens.
    counts = torch.bincount(flat, minlength=self.num_experts + 1)[: self.num_experts].tolist()
    picks = flat.argsort(stable=True)[: sum(counts)].split(counts)
    matrices = unstacked(self)
    for expert in range(self.num_experts):
        if counts[expert]:
            token = picks[expert] // top_k_index.shape[-1]
            hidden = expert_hidden(self, hidden_states[token], expert, matrices)
            states = expert_output(self, hidden, expert, matrices)
            output.index_add_(0, token, (states * weights[picks[expert], None]).to(output.dtype))
    return output


def grouped_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run stacked experts side by side, one grouped product per factor; nothing depends on counts on the host.

    The same sums as `eager_experts_forward`, for weights that are low rank + sparse or dense. It executes as many
    operations, but for rows of zeros that fill up ranks and kept rows (see `row_levels`).

    Args:
        hidden_states: [T, D].
        top_k_index: int [T, K]; the index `num_experts` means no expert.
        top_k_weights: [T, K].
    """
    tokens, top_k = top_k_index.shape
    picks = Picks.sort(top_k_index, self.num_experts)
    states = hidden_states[picks.order // top_k]
    if states.requires_grad:  # the gradient of rows of no expert is whatever is in memory
        states = states.masked_fill(picks.none, 0)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _grouped_linear(self, states, name, picks)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    output = _grouped_linear(self, hidden, "down_proj", picks)
    if self.has_post_expert_norm:
        output = self.post_expert_norm(output)
    weighted = output * top_k_weights.flatten()[picks.order, None]
    return picks.restored(weighted).view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


@dataclass(frozen=True)
class Picks:
    """Picks of all tokens, sorted by expert: N = T * K of them.

    `order` int [N] their places before, `expert` int [N], `none` bool [N, 1] those of no expert, which come last,
    `ends` int [G] where the picks of each expert end.
    """

    order: torch.Tensor
    expert: torch.Tensor
    none: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def sort(cls, index: torch.Tensor, num_experts: int) -> "Picks":
        """Sort the picks int [T, K], of which `num_experts` means no expert."""
        expert, order = index.flatten().sort(stable=True)
        numbers = torch.arange(num_experts, device=index.device)
        ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
        return cls(order, expert.clamp(max=num_experts - 1), (expert == num_experts)[:, None], ends)

    def restored(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` [N, ...] in the order that the picks had before."""
        places = torch.arange(len(self.order), device=values.device)
        return values[torch.empty_like(self.order).scatter_(0, self.order, places)]


def _grouped_linear(experts: nn.Module, states: torch.Tensor, name: str, picks: Picks) -> torch.Tensor:
    """Return [N, out] of `states` [N, in], each row by the weight called `name` of its expert."""
    bias = getattr(experts, f"{name}_bias")[picks.expert] if experts.has_bias else None
    if name in low_rank_of(experts):
        output = _grouped_low_rank(experts, states, name, picks)
        output = output if bias is None else output + bias
    elif name in quantized_of(experts):
        output = experts.quantized_product(name, states, picks.ends)
        output = output if bias is None else output + bias
    else:
        weight = getattr(experts, name)
        output = moe._grouped_linear(states, weight, picks.ends, bias=bias, is_transposed=experts.is_transposed)
    # Grouped products leave rows of no expert as they find them in memory.
    return output.masked_fill_(picks.none, 0)


def _grouped_low_rank(experts: nn.Module, states: torch.Tensor, name: str, picks: Picks) -> torch.Tensor:
    quantized = quantized_of(experts)
    dense = [getattr(experts, f"{name}_{part}") for part in ("u", "v", "s") if f"{name}_{part}" not in quantized]
    states = states.to(dense[0].dtype) if dense else states
    output = _grouped_factor(experts, f"{name}_u", _grouped_factor(experts, f"{name}_v", states, picks), picks)
    counts, columns = experts.low_rank[name]["kept_rows"], name in experts.sparse_columns
    if f"{name}_s" in quantized:
        return _add_quantized_sparse(experts, output, states, name, picks)
    s = getattr(experts, f"{name}_s")
    if counts is None:
        kept = getattr(experts, f"{name}_kept")[picks.expert]
        if columns:
            return output + moe._grouped_linear(states * kept, s, picks.ends, is_transposed=True)
        return output + moe._grouped_linear(states, s, picks.ends) * kept
    if not sum(counts):
        return output
    rows = getattr(experts, f"{name}_rows").long()
    return _add_sparse(output, s.split(counts), rows.split(counts), states, picks, columns=columns)


def _grouped_factor(experts: nn.Module, name: str, states: torch.Tensor, picks: Picks) -> torch.Tensor:
    """Return [N, out] of `states` [N, in], each row by its expert's factor, quantized or not."""
    if name in quantized_of(experts):
        return experts.quantized_product(name, states, picks.ends)
    factor = getattr(experts, name)
    rows, down, right = factor.shape[-2], -factor.shape[-2] % ALIGNMENT, -factor.shape[-1] % ALIGNMENT
    if not down and not right:
        return moe._grouped_linear(states, factor, picks.ends)
    factor, states = nn.functional.pad(factor, (0, right, 0, down)), nn.functional.pad(states, (0, right))
    return moe._grouped_linear(states, factor, picks.ends)[:, :rows]


def _add_quantized_sparse(
    experts: nn.Module, output: torch.Tensor, states: torch.Tensor, name: str, picks: Picks
) -> torch.Tensor:
    """Return `output` [N, out] and what the kept rows, or columns, of a quantized S add to it for `states` [N, in]."""
    counts = experts.low_rank[name]["kept_rows"]
    rows = getattr(experts, f"{name}_rows").long().split(counts)
    places = torch.stack([nn.functional.pad(one, (0, max(counts) - len(one))) for one in rows])[picks.expert]
    if name in experts.sparse_columns:
        kept = states.gather(1, places)
        return output + experts.quantized_product(f"{name}_s", kept, picks.ends, is_transposed=True)
    return output.scatter_add(1, places, experts.quantized_product(f"{name}_s", states, picks.ends))


def _add_sparse(
    output: torch.Tensor,
    s: tuple[torch.Tensor, ...],
    rows: tuple[torch.Tensor, ...],
    states: torch.Tensor,
    picks: Picks,
    *,
    columns: bool,
) -> torch.Tensor:
    """Return `output` [N, out] and what S, by its kept rows or `columns`, adds to it for `states` [N, in].

    Experts stand by falling numbers of rows: those with at least so many then have the first picks, after which a
    grouped product stops. So none computes the rows that only others have.

    Args:
        s: each expert's kept rows [n, in], or columns [n, out].
        rows: their places, int [n].
    """
    levels = row_levels([len(one) for one in rows])
    s, rows = _filled(s, rows, levels)
    if len(set(levels)) == 1:  # they stand so already
        places = torch.stack(rows)[picks.expert]
        product = _kept_product(torch.stack(s), places, states, picks.ends, columns=columns)
        return output + product if columns else output.scatter_add(1, places, product)
    order = sorted(range(len(levels)), key=lambda expert: -levels[expert])
    place = torch.tensor([order.index(expert) for expert in range(len(order))], device=states.device)
    own = Picks.sort(place[picks.expert].masked_fill(picks.none[:, 0], len(order)), len(order))
    states, result, start = states[own.order], torch.zeros_like(output), 0
    for end in sorted(set(levels) - {0}):
        members = [expert for expert in order if levels[expert] >= end]
        # Picks after the product's last group: what it leaves there, forward and backward, counts nowhere.
        others = (own.expert >= len(members))[:, None] | own.none
        weight = torch.stack([s[expert][start:end] for expert in members])
        places = torch.stack([rows[expert][start:end] for expert in members])
        places = places[own.expert.clamp(max=len(members) - 1)]
        known, ends = states.masked_fill(others, 0), own.ends[: len(members)]
        product = _kept_product(weight, places, known, ends, columns=columns).masked_fill(others, 0)
        result = result.add_(product) if columns else result.scatter_add_(1, places, product)
        start = end
    return output + own.restored(result)


def _kept_product(
    weight: torch.Tensor, places: torch.Tensor, states: torch.Tensor, ends: torch.Tensor, *, columns: bool
) -> torch.Tensor:
    """Return one grouped product of kept rows, [N, n], or columns, [N, out], for `states` [N, in].

    Args:
        weight: [groups, n, in], or [groups, n, out] of columns.
        places: int [N, n], the rows or columns of each pick's expert.
        ends: int [groups], where each group's picks end.
    """
    if columns:
        return moe._grouped_linear(states.gather(1, places), weight, ends, is_transposed=True)
    return moe._grouped_linear(states, weight, ends)


def _filled(
    s: tuple[torch.Tensor, ...], rows: tuple[torch.Tensor, ...], levels: list[int]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return as many rows per expert as `levels` says: rows of zeros, which add nothing to row 0, follow its own."""
    missing = [level - len(one) for level, one in zip(levels, rows, strict=True)]
    values = tuple(nn.functional.pad(one, (0, 0, 0, more)) for one, more in zip(s, missing, strict=True))
    return values, tuple(nn.functional.pad(one, (0, more)) for one, more in zip(rows, missing, strict=True))


def row_levels(counts: list[int]) -> list[int]:
    """Return for each expert's number of kept rows the number that grouped products compute: a few values for all.

    Multiples of `ALIGNMENT`; where that leaves more than `MAX_LEVELS`, the largest, its half, the half of that, and so
    on, which is less than twice the rows (beyond alignment).
    """

    def aligned(number: float) -> int:
        return math.ceil(number / ALIGNMENT) * ALIGNMENT

    levels = [aligned(count) for count in counts]
    if len(set(levels) - {0}) <= MAX_LEVELS:
        return levels
    steps = [aligned(max(levels) / 2**power) for power in range(max(levels).bit_length())]
    return [min(step for step in steps if step >= level) if level else 0 for level in levels]


def unstacked(experts: nn.Module) -> dict[str, Any]:
    """Return each weight of the experts by its name, to be indexed by expert.

    By that it is a matrix, a bias, factors, or a quantized matrix, which is dequantized when something is multiplied.
    """
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    biases = [name + "_bias" for name in names] if experts.has_bias else []
    low_rank = low_rank_of(experts)
    # By name, not from the list of parameters: PEFT turns those that it adapts into computed attributes.
    quantized = {name for name in names if name in quantized_of(experts)}
    stored = quantized | low_rank.keys()
    dense = {name: _by_expert(getattr(experts, name)) for name in names + biases if name not in stored}
    packed = {name: experts.quantized_stack(name) for name in quantized}
    return dense | packed | {name: experts.factors(name) for name in low_rank}


def _by_expert(weight: torch.Tensor) -> Any:
    """Return what `[expert]` takes an expert's part of.

    Taken apart once where there is a gradient: that of `weight[expert]` is a tensor of the size of all experts.
    """
    return weight.unbind(0) if weight.requires_grad and torch.is_grad_enabled() else weight


def expert_hidden(
    experts: nn.Module, states: torch.Tensor, expert: int, matrices: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return an expert's hidden states [n, F], after activation and gate, for `states` [n, D].

    Args:
        matrices: see `unstacked`; taken apart here where it is None.
    """
    return activated(experts, expert_inner(experts, states, expert, matrices))


def expert_inner(
    experts: nn.Module, states: torch.Tensor, expert: int, matrices: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return what W_in makes of `states` [n, D], before activation and gate: [n, F], or [n, 2F] with a gate."""
    matrices = unstacked(experts) if matrices is None else matrices
    return _expert_linear(experts, matrices, states, "gate_up_proj" if experts.has_gate else "up_proj", expert)


def activated(experts: nn.Module, inner: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [n, F] that follow from `expert_inner`."""
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


def expert_output(
    experts: nn.Module, hidden: torch.Tensor, expert: int, matrices: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return an expert's output [n, D] for its `hidden` states [n, F]."""
    matrices = unstacked(experts) if matrices is None else matrices
    output = _expert_linear(experts, matrices, hidden, "down_proj", expert)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _expert_linear(
    experts: nn.Module, matrices: dict[str, Any], states: torch.Tensor, name: str, expert: int
) -> torch.Tensor:
    matrix = matrices[name][expert]
    bias = matrices[name + "_bias"][expert] if experts.has_bias else None
    if isinstance(matrix, Factors | QuantizedMatrix):
        return matrix(states) if bias is None else matrix(states) + bias
    return nn.functional.linear(
        states.to(matrix.dtype), _transposed(matrix) if experts.is_transposed else matrix, bias
    )


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix transposed; of a class for quantized ones, which mostly have no transpose, its values."""
    return matrix.dequantize().T if "dequantize" in vars(type(matrix)) else matrix.T
