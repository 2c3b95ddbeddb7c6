"""How merged experts compute: one after another, or by grouped products. This file travels with every checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import moe

from .losparse_mcsmoe import Factors

# Grouped products want rows of a multiple of 16 bytes: 8 values of bfloat16.
ALIGNMENT = 8


def merge_picks(
    expert_map: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send a router's picks to the stored experts; picks of one token that meet in an expert become one.

    The first of them carries the sum of their weights (`g_1 + g_2` times the merged expert). The others, and picks
    whose weight is 0 (a token over capacity, a skipped expert), get the index `num_experts`, which is never computed.

    Args:
        expert_map: int [E] -> [G].
        top_k_index: int [T, K], in [0, E).
        top_k_weights: [T, K].
        num_experts: G.
    """
    index = expert_map[top_k_index].masked_fill(top_k_weights == 0, num_experts)
    if index.shape[-1] == 1:
        return index, top_k_weights
    same = index[:, :, None] == index[:, None, :]  # [T, K, K]
    repeated = same.tril(-1).any(-1)  # [T, K]
    summed = (same * top_k_weights[:, None, :]).sum(-1, dtype=top_k_weights.dtype)
    return index.masked_fill(repeated, num_experts), summed.masked_fill(repeated, 0)


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
    operations, but for S: experts that keep fewer rows than another of their layer compute with zeros for the rest.

    Args:
        hidden_states: [T, D].
        top_k_index: int [T, K]; the index `num_experts` means no expert.
        top_k_weights: [T, K].
    """
    tokens, top_k = top_k_index.shape
    picks = Picks.sort(top_k_index, self.num_experts)
    states = hidden_states[picks.order // top_k].masked_fill(picks.none, 0)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _grouped_linear(self, states, name, picks)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    output = _grouped_linear(self, hidden, "down_proj", picks)
    if self.has_post_expert_norm:
        output = self.post_expert_norm(output)
    weighted = output * top_k_weights.flatten()[picks.order, None]
    back = torch.empty_like(picks.order).scatter_(0, picks.order, torch.arange(len(picks.order), device=output.device))
    return weighted[back].view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


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


def _grouped_linear(experts: nn.Module, states: torch.Tensor, name: str, picks: Picks) -> torch.Tensor:
    """Return [N, out] of `states` [N, in], each row by the weight called `name` of its expert."""
    bias = getattr(experts, f"{name}_bias")[picks.expert] if experts.has_bias else None
    if name in experts.low_rank:
        output = _grouped_low_rank(experts, states, name, picks)
        output = output if bias is None else output + bias
    else:
        weight = getattr(experts, name)
        output = moe._grouped_linear(states, weight, picks.ends, bias=bias, is_transposed=experts.is_transposed)
    # Grouped products leave rows of no expert as they find them in memory.
    return output.masked_fill(picks.none, 0)


def _grouped_low_rank(experts: nn.Module, states: torch.Tensor, name: str, picks: Picks) -> torch.Tensor:
    u, v, s = (getattr(experts, f"{name}_{part}") for part in ("u", "v", "s"))
    states = states.to(v.dtype)
    if padding := -u.shape[-1] % ALIGNMENT:
        u, v = nn.functional.pad(u, (0, padding)), nn.functional.pad(v, (0, 0, 0, padding))
    output = moe._grouped_linear(moe._grouped_linear(states, v, picks.ends), u, picks.ends)
    counts = experts.low_rank[name]["kept_rows"]
    if counts is None:
        kept = getattr(experts, f"{name}_kept")[picks.expert]
        return output + moe._grouped_linear(states, s, picks.ends) * kept
    if not sum(counts):
        return output
    # Rows of zeros, which add nothing to row 0, make all experts keep as many.
    padding = -max(counts) % ALIGNMENT
    s = nn.functional.pad(pad_sequence(s.split(counts), batch_first=True), (0, 0, 0, padding))
    rows = getattr(experts, f"{name}_rows").long().split(counts)
    rows = nn.functional.pad(pad_sequence(rows, batch_first=True), (0, padding))
    product = moe._grouped_linear(states, s, picks.ends)
    return output.scatter_add(1, rows[picks.expert], product)


def unstacked(experts: nn.Module) -> dict[str, Any]:
    """Return each weight of the experts as one entry per expert: a matrix, a bias, or the factors of a matrix.

    Taken apart once, not at each use: the gradient of `weight[expert]` is a tensor of the size of all experts.
    """
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    biases = [name + "_bias" for name in names] if experts.has_bias else []
    # By name, not from the list of parameters: PEFT turns those that it adapts into computed attributes.
    dense = {name: getattr(experts, name).unbind(0) for name in names + biases if name not in experts.low_rank}
    return dense | {name: experts.factors(name) for name in experts.low_rank}


def expert_hidden(
    experts: nn.Module, states: torch.Tensor, expert: int, matrices: dict[str, Any] | None = None
) -> torch.Tensor:
    """Return an expert's hidden states [n, F], after activation and gate, for `states` [n, D].

    Args:
        matrices: see `unstacked`; taken apart here where it is None.
    """
    matrices = unstacked(experts) if matrices is None else matrices
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden = _expert_linear(experts, matrices, states, name, expert)
    return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)


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
    if isinstance(matrix, Factors):
        return matrix(states) if bias is None else matrix(states) + bias
    return nn.functional.linear(states.to(matrix.dtype), matrix.T if experts.is_transposed else matrix, bias)
