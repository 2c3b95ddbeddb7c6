"""M-SMoE written a second time, with plain loops and no code of the package: what the tests compare with."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PreTrainedModel

Expert = dict[str, torch.Tensor]


def softmax(values: list[float]) -> list[float]:
    """Return probabilities."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def over_all(logits: list[float], picks: list[int]) -> list[float]:
    """Return the picks' weights where the softmax runs over all experts."""
    return [softmax(logits)[pick] for pick in picks]


def over_picks(logits: list[float], picks: list[int]) -> list[float]:
    """Return the picks' weights where they sum to 1."""
    return softmax([logits[pick] for pick in picks])


@dataclass(frozen=True)
class Family:
    """What a family's routers look like from outside."""

    router: str
    weight: str
    top_k: int
    gates: Callable[[list[float], list[int]], list[float]]
    bias: str = ""
    capacity: int | None = None


FAMILIES = {
    "switch_transformers": Family("router", "classifier.weight", 1, over_all, capacity=3),
    "mixtral": Family("gate", "weight", 2, over_picks),
    "qwen3_moe": Family("gate", "weight", 3, over_all),
    "gpt_oss": Family("router", "weight", 4, over_picks, bias="bias"),
}


@dataclass(frozen=True)
class Token:
    """One token at one router: its logits, its picks (expert, weight), and whether its expert was full already."""

    logits: list[float]
    picks: list[tuple[int, float]]
    dropped: bool


@torch.no_grad()
def observe(model: PreTrainedModel, family: Family, batches: Iterable[dict[str, Any]]) -> dict[str, list[Token]]:
    """Run a model and return, per experts container, its tokens in order."""
    seen: dict[str, list[Token]] = {}

    def record(name: str, router: nn.Module) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            hidden_states = arguments[0].double()
            scores = hidden_states @ router.get_parameter(family.weight).double().T
            if family.bias:
                scores = scores + router.get_parameter(family.bias).double()
            rows = scores.tolist() if scores.ndim == 3 else [scores.tolist()]
            for row in rows:
                seen.setdefault(name, []).extend(_route(row, family))

        return hook

    routers = {name: module for name, module in model.named_modules() if name.endswith("mlp." + family.router)}
    handles = [
        module.register_forward_pre_hook(record(name.removesuffix(family.router) + "experts", module))
        for name, module in routers.items()
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def _route(sequence: list[list[float]], family: Family) -> list[Token]:
    tokens, load = [], [0] * len(sequence[0])
    for logits in sequence:
        picks = sorted(range(len(logits)), key=lambda expert: -logits[expert])[: family.top_k]
        for pick in picks:
            load[pick] += 1
        dropped = family.capacity is not None and load[picks[0]] > family.capacity
        tokens.append(Token(logits, list(zip(picks, family.gates(logits, picks), strict=True)), dropped))
    return tokens


@dataclass(frozen=True)
class Sums:
    """Counts [E], sums of weights [E] and the Gram matrix [E][E] of the logits over `tokens` tokens."""

    counts: list[int]
    gates: list[float]
    gram: list[list[float]]
    tokens: int

    def cosine(self, i: int, j: int) -> float:
        """Return the cosine of two experts' logits."""
        return self.gram[i][j] / math.sqrt(self.gram[i][i] * self.gram[j][j])


def sums(tokens: list[Token], keep: Iterable[Any] | None = None) -> Sums:
    """Sum over the tokens that were not dropped and that `keep` (one truth value a token) says count."""
    kept = [True] * len(tokens) if keep is None else list(keep)
    tokens = [token for token, counts in zip(tokens, kept, strict=True) if counts and not token.dropped]
    size = len(tokens[0].logits)
    counts, gates, gram = [0] * size, [0.0] * size, [[0.0] * size for _ in range(size)]
    for token in tokens:
        for expert, weight in token.picks:
            counts[expert] += 1
            gates[expert] += weight
        for i in range(size):
            for j in range(size):
                gram[i][j] += token.logits[i] * token.logits[j]
    return Sums(counts, gates, gram, len(tokens))


def budget(counts: list[list[int]], total: int, minimum: int = 1) -> list[int]:
    """Give out the experts one by one: to the layer whose next expert is the most frequent for its layer."""
    orders = [sorted(range(len(layer)), key=lambda expert, layer=layer: (-layer[expert], expert)) for layer in counts]
    kept = [minimum] * len(counts)
    while sum(kept) < total:
        waiting = []
        for position, (layer, order) in enumerate(zip(counts, orders, strict=True)):
            if kept[position] < len(layer):
                expert = order[kept[position]]
                share = layer[expert] / max(max(layer), 1)
                waiting.append((-share, expert, position))
        kept[min(waiting)[2]] += 1
    return kept


def group(layer: Sums, number: int) -> tuple[list[int], list[int]]:
    """Return the expert map and the dominant experts of a layer that keeps `number` experts."""
    order = sorted(range(len(layer.counts)), key=lambda expert: (-layer.counts[expert], expert))
    dominant = sorted(order[:number])
    expert_map = []
    for expert in range(len(layer.counts)):
        best = max(dominant, key=lambda other: (other == expert, layer.cosine(expert, other), -other))
        expert_map.append(dominant.index(expert) if expert in dominant else dominant.index(best))
    return expert_map, dominant


# Axis of the hidden neurons in an expert's matrices; a bias of theirs is a matrix of one column.
AXES = {"up": 0, "gate": 0, "up_bias": 0, "down": 1}


def aligned(expert: Expert, reference: Expert) -> Expert:
    """Reorder an expert's hidden neurons so that they fit the reference's best."""
    gain = sum(
        reference[role].double().movedim(AXES[role], 0) @ expert[role].double().movedim(AXES[role], 0).T
        for role in expert
    )
    _, order = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return {
        role: matrix.index_select(AXES[role], torch.from_numpy(order).to(matrix.device))
        for role, matrix in expert.items()
    }


def merged(experts: list[Expert], members: list[int], dominant: int, counts: list[int]) -> Expert:
    """Return the mean of a group, in float64, weighted by counts: of all alike if none of them was ever picked."""
    weights = [counts[member] for member in members]
    weights = weights if sum(weights) else [1] * len(members)
    total = {role: torch.zeros_like(matrix, dtype=torch.float64) for role, matrix in experts[0].items()}
    for member, weight in zip(members, weights, strict=True):
        expert = experts[member] if member == dominant else aligned(experts[member], experts[dominant])
        for role, matrix in expert.items():
            total[role] += matrix.double() * weight / sum(weights)
    return total
