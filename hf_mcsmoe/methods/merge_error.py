"""What is lost if two experts become one: the error that no mix of them avoids, and that of their mean."""

from collections.abc import Callable
from dataclasses import replace

import torch

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.same_tokens import output_gram, squared_distances
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

PAIRS = ("pair_gate_squares", "pair_shares", "pair_share_squares")


def _pair_sums(routed: Routed, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the sum of a function of both gates [n] over the tokens that reached both of two experts, float64 [E, E].

    The diagonal is 0.
    """
    number, gates, picks = routed.num_experts, routed.gates.double(), routed.index.shape[1]
    apart = ~torch.eye(picks, dtype=torch.bool, device=gates.device)
    token, one, other = torch.where(routed.reached[:, :, None] & routed.reached[:, None, :] & apart)  # [n] pairs
    place = routed.index[token, one] * number + routed.index[token, other]
    values = of(gates[token, one], gates[token, other])
    return torch.bincount(place, values, minlength=number * number).view(number, number).double()


@STATISTICS.register("pair_gate_squares", axes="EE")
def pair_gate_squares(routed: Routed) -> torch.Tensor:
    """Return the sum of `(g_i + g_j)^2` over the tokens that reached both experts i and j, float64 [E, E]."""
    return _pair_sums(routed, lambda one, other: (one + other).square())


@STATISTICS.register("pair_shares", axes="EE")
def pair_shares(routed: Routed) -> torch.Tensor:
    """Return the sum of `g_i / (g_i + g_j)` over the tokens that reached both experts i and j, float64 [E, E]."""
    return _pair_sums(routed, lambda one, other: one / (one + other))


@STATISTICS.register("pair_share_squares", axes="EE")
def pair_share_squares(routed: Routed) -> torch.Tensor:
    """Return the sum of `(g_i / (g_i + g_j))^2` over the tokens that reached both i and j, float64 [E, E]."""
    return _pair_sums(routed, lambda one, other: (one / (one + other)).square())


@SIMILARITY.register("merge_error", paper="2510.13999", needs=["co_activation", "tokens", "sample", *PAIRS])
def merge_error(view: LayerView) -> torch.Tensor:
    """Return minus the error per token that no constant mix of two experts avoids, float64 [E, E] (REAP).

    `E[(g_i + g_j)^2] Var[g_i / (g_i + g_j)] E|f_i - f_j|^2`: the first over all tokens, 0 where not both are picked,
    the second over those that picked both, the third over the sample. Two that are never picked together have none,
    so that experts of top-1 routers are all alike.
    """
    squares, shares, share_squares = (view.sums[name] for name in PAIRS)
    both = view.sums["co_activation"].double().clamp(min=1)
    variance = (share_squares / both - (shares / both).square()).clamp(min=0)
    distances = squared_distances(output_gram(view)) / len(view.sample.hidden)
    error = squares / view.sums.tokens.clamp(min=1) * variance * distances
    return -(error + error.T) / 2  # which differ by rounding alone


@SIMILARITY.register("mse", paper="2310.01334", needs=["sample"])
def mse(view: LayerView) -> torch.Tensor:
    """Return `1 / (1 + e_ij / s)` for the squared error e_ij of the mean of two experts' weights, float64 [E, E].

    e_ij is summed over the tokens of the sample that reached i or j, against what these gave for them, as in the
    released code of M-SMoE, whose `1 / (1 + 0.1 log e)` falls with it as well but has a pole; s is the squared norm
    of all outputs of the layer's sample. No neuron is moved. E^2 / 2 merged experts are run: the dearest of all.
    """
    rows = view.sample.per_input()
    states = [rows.hidden[(rows.reached & (rows.index == expert)).any(1)] for expert in range(view.num_experts)]
    outputs = [view.experts.output(expert, inputs) for expert, inputs in enumerate(states)]
    errors = torch.zeros(view.num_experts, view.num_experts, dtype=torch.float64)
    for i in range(view.num_experts):
        for j in range(i):
            found = _mean_of(view, i, j).output(0, torch.cat([states[i], states[j]]))
            wanted = torch.cat([outputs[i], outputs[j]])
            errors[i, j] = errors[j, i] = (found - wanted).double().square().sum().item()
    scale = sum(given.double().square().sum().item() for given in outputs)
    return 1 / (1 + errors / (scale or 1))


def _mean_of(view: LayerView, one: int, other: int) -> Experts:
    """Return one expert with the mean of two experts' weights."""
    pairs = {role: (tensor[one], tensor[other]) for role, tensor in view.experts.tensors.items()}
    return replace(view.experts, tensors={role: [(a.float() + b.float()) / 2] for role, (a, b) in pairs.items()})
