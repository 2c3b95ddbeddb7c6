"""Experts of high or low precision, chosen token by token by how much their output counts (HOBBIT). This file travels.

The K experts of a token are sorted by their weight. Those that follow a small share of the weight are computed as they
are, those that follow a larger share with weights of few bits, and the last ones not at all. The low weights are
quantized anew where a forward needs them, from the weights as they are: what is measured here is what the choice does
to the outputs. What it saves is bytes to be loaded, which `simulate` of `expert_cache` counts.

Source: Tang and others, HOBBIT (arXiv 2411.01433), sections 3.2 and 3.3, where the choice is made on a miss of the
cache while tokens are generated; here it is made for every token.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, become, check_counts, generated_in, subclass

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
BITS = (8, 4, 3, 2)


class MixedPrecisionModel(VariantModel):
    """A model whose experts are computed in one of two precisions."""

    prefix: ClassVar[str] = "MixedPrecision"

    def install(self: Any, **options: Any) -> None:
        """Give every container of experts the choice.

        Raises:
            ValueError: there are no experts of the library's interface, or an input axis is no multiple of a group.
        """
        found = list(_experts(self))
        if not found:
            raise ValueError(f"{type(self).__name__} has no experts of the library's stacked layout.")
        for experts in found:
            _check_groups(experts, options["group_size"])
        for experts in found:
            experts.__class__ = subclass(MixedPrecisionExperts, type(experts))
            experts.precision_options, experts.weight_names = dict(options), list(experts._parameters)


class MixedPrecisionExperts(nn.Module):
    """Mixin of a container of experts."""

    prefix: ClassVar[str] = "MixedPrecisionExpertsOf"
    # t1, t2, bits (0 skips), group_size.
    precision_options: dict[str, Any]
    # All weights and biases, also those that adapters compute from others.
    weight_names: list[str]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the experts picked, [T, D].

        Args:
            hidden_states: [T, D].
            top_k_index: [T, K].
            top_k_weights: [T, K].
        """
        options = self.precision_options
        high, low = choose_precision(top_k_weights, options["t1"], options["t2"])
        output = super().forward(hidden_states, top_k_index, top_k_weights.where(high, 0))
        if not options["bits"] or not low.any():
            return output
        used, index = top_k_index[low].unique(), torch.zeros_like(top_k_index)
        index[low] = torch.searchsorted(used, top_k_index[low])
        weights = top_k_weights.where(low, 0)
        return output + super(MixedPrecisionExperts, self._low(used)).forward(hidden_states, index, weights)

    def _low(self, used: torch.Tensor) -> Any:
        """Return these experts alone, in few bits, as a container of their own."""
        axis = 1 if self.is_transposed else 2
        bits, size = self.precision_options["bits"], self.precision_options["group_size"]
        weights = {name: getattr(self, name)[used] for name in self.weight_names}
        low = {name: rounded(weight, bits, size, axis) for name, weight in weights.items() if name in MATRICES}
        # Not a copy, nor of the class that adapters derive, whose attributes would come before the weights.
        container: Any = object.__new__(next(cls for cls in type(self).__mro__ if "generated_from" in vars(cls)))
        vars(container).update(vars(self) | {"_parameters": weights | low, "num_experts": len(used)})
        return container


def choose_precision(weights: torch.Tensor, t1: float, t2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which picks are computed in high and which in low precision, both bool [T, K]; the others are skipped.

    A pick is judged by the share of the token's weight that larger picks have: up to `t1` high, up to `t2` low.

    Args:
        weights: of the picks, [T, K], in any order.

    Source: HOBBIT, section 3.2.
    """
    share = weights.float().abs()
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    before = (ordered.cumsum(dim=-1) - ordered).clamp(0, 1)
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, 1:]], dim=-1)
    score = torch.empty_like(before).scatter_(-1, order, before)
    return score <= t1, (score > t1) & (score <= t2)


def rounded(weight: torch.Tensor, bits: int, group_size: int, axis: int = -1) -> torch.Tensor:
    """Return a weight rounded to symmetric levels of so many bits, with a scale for each group along the input axis.

    Gradients pass as if it were not rounded.
    """
    grouped = weight.movedim(axis, -1)
    shape, most = grouped.shape, 2 ** (bits - 1) - 1
    grouped = grouped.reshape(*shape[:-1], -1, group_size)
    scale = grouped.detach().abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / most
    levels = (grouped.detach() / scale).round().clamp(-most, most) * scale
    return (grouped + (levels - grouped.detach())).reshape(shape).movedim(-1, axis)


def mix_precision(
    model: PreTrainedModel, *, t1: float = 0.6, t2: float = 0.9, bits: int = 4, group_size: int = 32
) -> PreTrainedModel:
    """Let a model compute its experts in high or low precision, token by token; changed in place, and returned.

    Args:
        t1: share of a token's weight up to which picks keep their precision; with 1 the model is as before.
        t2: share up to which picks are computed in few bits; those beyond are skipped.
        bits: of the low precision, 8, 4, 3 or 2; 0 skips all picks beyond `t1`.
        group_size: how many inputs share a scale.

    Raises:
        ValueError: a number is out of its range, or the model has no experts of the library's stacked layout.
    """
    if not 0 <= t1 <= t2 <= 1:
        raise ValueError(f"Needs 0 <= t1 <= t2 <= 1, not t1={t1} and t2={t2}.")
    if bits not in (*BITS, 0):
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, or 0 to skip, not {bits}.")
    check_counts(group_size=group_size)
    become(model, MixedPrecisionModel, {"t1": t1, "t2": t2, "bits": bits, "group_size": group_size})
    return model


def _experts(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if {"is_transposed", "has_gate"} <= vars(module).keys() and "down_proj" in module._parameters:
            yield module


def _check_groups(experts: Any, group_size: int) -> None:
    axis = 1 if experts.is_transposed else 2
    for name, parameter in experts.named_parameters(recurse=False):
        if name in MATRICES and parameter.shape[axis] % group_size:
            raise ValueError(
                f"group_size must divide the {parameter.shape[axis]} inputs of {name}, which {group_size} does not."
            )


@torch.no_grad()
def next_layer_accuracy(model: PreTrainedModel, batch: dict[str, torch.Tensor], ahead: int = 1) -> list[float]:
    """Return how often a later layer's router picks the same first expert when it reads an earlier layer's input.

    Args:
        batch: what the model is called with.
        ahead: how many layers later.

    Returns:
        For each layer that has one so much later, the share of tokens.

    Raises:
        ValueError: the model has no two layers with routers so far apart.

    Source: HOBBIT, section 3.3.
    """
    gates = [block.gate for block in model.modules() if {"gate", "experts"} <= dict(block.named_children()).keys()]
    if not 1 <= ahead < len(gates):
        raise ValueError(
            f"ahead must be from 1 to {len(gates) - 1} for {len(gates)} layers with routers, not {ahead}."
        )
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        cast(nn.Module, gate).register_forward_hook(lambda _, args, __, layer=layer: seen.update({layer: args[0]}))
        for layer, gate in enumerate(gates)
    ]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    firsts = [
        [_first(gates[layer + ahead], seen[at]) for at in (layer, layer + ahead)]
        for layer in range(len(gates) - ahead)
    ]
    return [float((early == late).float().mean()) for early, late in firsts]


def _first(gate: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the expert of the largest weight, [T]."""
    _, weights, index = gate(hidden_states)[:3]
    return index.gather(-1, weights.argmax(-1, keepdim=True))[:, 0]


def __getattr__(name: str) -> type[Any]:
    return generated_in((MixedPrecisionModel, MixedPrecisionExperts), name)
