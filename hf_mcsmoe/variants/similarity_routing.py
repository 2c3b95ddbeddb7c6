"""Routers that average over similar or attended tokens, added to a model after a look at the rule that they follow.

Source: as that of similarity_routing_mcsmoe.py, which is what travels.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.variants.remote_mcsmoe import become, check_whole
from hf_mcsmoe.variants.similarity_routing_mcsmoe import EAGER, SimilarityRoutingModel, attention_of, router_of
from hf_mcsmoe.variants.stacks_mcsmoe import block_path, stacks

# How many random tokens tell what rule a router follows, and how far its weights may be from it.
PROBES, TOLERANCE = 64, 1e-4
# What sigma may be, and the root of tau: float32 does not tell similarities apart that are nearer than their rounding,
# and overflows where they are divided by less than it holds.
LEAST, MOST = 1e-3, 1e6
# Weights that a router of the rule has.
KNOWN = {"weight", "bias"}


def add_similarity_routing(model: PreTrainedModel, tau: float = 0.1, *, normalize: bool = True) -> PreTrainedModel:
    """Let the routers of a model average over similar tokens of the same row; changed in place, and returned.

    Args:
        tau: temperature of the softmax over tokens; towards 0 the model is as before, with `normalize`.
        normalize: whether the router's inputs are scaled to norm 1 before they are compared, so that nothing is as
            similar to a token as itself; False as published.

    Raises:
        ValueError: `tau` is not from 1e-6 to 1e12, or the model has no routers that take the largest of a softmax.
    """
    if not LEAST**2 <= tau <= MOST**2:
        raise ValueError(f"tau must be from {LEAST**2:g} to {MOST**2:g}, not {tau}.")
    return _add(model, {"kind": "similarity", "tau": tau, "normalize": normalize})


def add_attention_routing(model: PreTrainedModel, sigma: float | None = 1.0) -> PreTrainedModel:
    """Let the routers of a model average over the tokens that attention reads; changed in place, and returned.

    For each token it is the head whose mean entropy over the row's tokens so far is the lowest (of all of its tokens,
    where no token is hidden from another).

    Args:
        sigma: width of the Gaussian that weighs a token by how near its router's input is, both scaled to norm 1; None
            for the attention alone.

    Raises:
        ValueError: the model was not loaded with `attn_implementation="eager"`, `sigma` is not from 1e-3 to 1e6, or
            the model has no routers that take the largest of a softmax, or no attention before one.
    """
    if sigma is not None and not LEAST <= sigma <= MOST:
        raise ValueError(f"sigma must be from {LEAST:g} to {MOST:g}, or None for the attention alone, not {sigma}.")
    if model.config._attn_implementation != "eager":
        raise ValueError(EAGER)
    return _add(model, {"kind": "attention", "sigma": sigma})


def _add(model: PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has two stacks of layers, which similarity routing does not serve.")
    check_whole(model)
    layers = [layer for _, stack in stacks(model) for layer in stack if block_path(layer)]
    for layer in layers:
        if router_of(layer) is None:
            raise ValueError(
                f"{type(layer).__name__} has experts without a gate: similarity routing does not serve it."
            )
        if options["kind"] == "attention" and attention_of(layer) is None:
            raise ValueError(f"{type(layer).__name__} has no attention before its experts that could guide them.")
    rules = {_rule(router_of(layer), model.config.get_text_config().hidden_size) for layer in layers}
    if len(rules) != 1:
        raise ValueError(f"{type(model).__name__} has no layers with experts, or its routers follow several rules.")
    is_normalized, scale = rules.pop()
    become(model, SimilarityRoutingModel, {**options, "is_normalized": is_normalized, "scale": scale})
    return model


@torch.no_grad()
def _rule(router: nn.Module, width: int) -> tuple[bool, float]:
    """Return whether a router's weights are shares of those picked, and what they are multiplied by.

    Raises:
        ValueError: it does anything else than to pick the largest of a softmax over all experts.
    """
    trial = copy.deepcopy(router).double().eval()
    tokens = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _answer(trial, tokens.to(next(trial.parameters()).device))
    if found is not None and {*trial.state_dict()} <= KNOWN:
        logits, weights, top_k = found
        values, index = logits.softmax(-1).topk(top_k, dim=-1)
        for is_normalized in (True, False):
            picked = values / values.sum(-1, keepdim=True) if is_normalized else values
            expected = torch.zeros_like(weights).scatter(-1, index, picked)
            scale = float(f"{float(weights.sum() / expected.sum()):.6g}")
            if torch.allclose(weights, scale * expected, atol=TOLERANCE * scale, rtol=TOLERANCE):
                return is_normalized, scale
    raise ValueError(
        f"{type(router).__name__} does something else than to pick the largest of a softmax over all experts (a "
        "sigmoid, groups, a correction, noise or capacity), which similarity routing does not serve."
    )


def _answer(router: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """Return logits and weights of all experts, both float64 [T, E], and K; None where a router returns others."""
    try:
        logits, weights, index = router(tokens)
        return logits.double(), torch.zeros_like(logits.double()).scatter(-1, index, weights.double()), index.shape[-1]
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
        return None
