"""Routers that consider a token's neighbours (similarity-aware and attention-aware routing). This file travels.

A router's probabilities p_j of the tokens j are averaged before the top-k: `r_i = sum_j S_ij p_j`, where S_i is a
distribution over the tokens that token i may see. Similarity-aware, `S_i = softmax_j(u_i W_s u_j / tau)` of the
router's inputs u, W_s learned; attention-aware, a row of one attention head, weighed by how near u_j is to u_i.
In a decoder a token sees itself and those before it in its row. While a text is generated, what the routers have to
know of past tokens lies in layers of its own in the `DynamicCache`, where it is reordered, cropped and repeated too.

Source: Nguyen, Tran, Nguyen and Baraniuk, Improving Routing in Sparse Mixture of Experts with Graph of Tokens (arXiv
2505.00792). That all tokens of a row are used, and not those of lower entropy alone, is what it does in practice.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, VariantModule, generated_in, subclass
from hf_mcsmoe.variants.stacks_mcsmoe import block_path, stacks

EAGER = (
    "Attention-aware routing reads the attention's weights, which only the eager implementation returns: load the "
    'model with attn_implementation="eager".'
)


class Tokens(NamedTuple):
    """What a model knows of its tokens and hands to its layers."""

    # [B, K] of all tokens with those in the cache; None where all are visible.
    mask: torch.Tensor | None
    # To which of a row's packed texts a token belongs, [B, S]; None where there is one. Read where there is no cache.
    texts: torch.Tensor | None
    # How many tokens the cache holds.
    seen: int


@dataclass
class Routing:
    """What a layer's router has to know, between the layer's call and its end."""

    tokens: Tokens
    # B, S.
    shape: tuple[int, int]
    cache: Any
    # Of the layer's attention, [B, H, S, K].
    weights: torch.Tensor | None = None


class SimilarityRoutingModel(VariantModel):
    """A model whose routers average over tokens."""

    prefix: ClassVar[str] = "SimilarityRouting"

    def install(self: Any, **options: Any) -> None:
        """Give every router of a stack of layers its neighbours."""
        for owner, stack in stacks(self):
            _install(stack, self.config.get_text_config().hidden_size, options)
            cast(Any, owner).forward_arguments = list(inspect.signature(type(owner).forward).parameters)[1:]
            owner.register_forward_pre_hook(_tell_layers, with_kwargs=True)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return what is asked for; where the attention's weights are read, eager attention.

        Raises:
            ValueError: another is asked for where the weights are read.
        """
        variant = vars(self.config).get("variant")
        if not variant or variant["options"]["kind"] != "attention":
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        if requested_attention not in (None, "eager"):
            raise ValueError(EAGER)
        return super().get_correct_attn_implementation("eager", is_init_check)


class RoutingLayer(nn.Module):
    """Mixin of a layer: tells its router, and the attention that the router reads, of the tokens."""

    prefix: ClassVar[str] = "RoutingLayerOf"
    # The router and the attention; empty where the layer has no experts.
    routing_parts: tuple[Any, ...]

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, routing_tokens: Tokens | None = None, **kwargs: Any
    ) -> Any:
        """Compute the layer.

        Args:
            hidden_states: [B, S, D].
        """
        if routing_tokens is None or hidden_states.dim() != 3:
            raise ValueError(
                f"{type(self).__name__} is not told of its tokens by the model around it, or does not get hidden "
                "states [B, S, D]: similarity routing does not serve this family."
            )
        batch, length, _ = hidden_states.shape
        routing = Routing(routing_tokens, (batch, length), kwargs.get("past_key_values"))
        for part in self.routing_parts:
            part.routing = routing
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:  # also where a checkpoint, recomputing, stops in the middle
            for part in self.routing_parts:
                part.routing = None


class RoutingAttention(nn.Module):
    """Mixin of an attention whose weights the router after it reads."""

    prefix: ClassVar[str] = "RoutingAttentionOf"
    routing: Routing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention, and keep its weights until the layer ends."""
        output = super().forward(*args, **kwargs)
        if output[1] is None:
            raise ValueError(EAGER)
        self.routing.weights = output[1]
        return output


class SimilarityMatrix(VariantModule):
    """W_s, [D, D], the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))

    def init_weights(self, std: float) -> None:
        """Begin with similarity as it is."""
        init.eye_(self.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return u W_s of inputs [..., D] in float32; called as a module, which an offloaded one has to be."""
        return inputs @ self.weight.float()


class SimilarityRouter(nn.Module):
    """Mixin of a router: averages its probabilities over the tokens that each may see."""

    prefix: ClassVar[str] = "SimilarityRouterOf"
    # kind; tau and normalize, or sigma; is_normalized and scale, by which the experts picked are weighed.
    routing_options: dict[str, Any]
    is_causal: bool
    # Which layer of the cache holds what is kept of past tokens.
    cache_index: int
    routing: Routing | None
    similarity: SimilarityMatrix

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log r [T, E], whose softmax is r, and the weights and the experts picked by it, both [T, K].

        Args:
            hidden_states: [B, S, D] or [T, D] with T = B S.
        """
        routing = self.routing
        if routing is None or hidden_states[..., 0].numel() != math.prod(routing.shape):
            raise ValueError(
                f"{type(self).__name__} is called outside of its layer, or not with all tokens of it, so that no "
                "neighbours are known: call the model."
            )
        logits, weights, _ = super().forward(hidden_states)
        inputs = hidden_states.reshape(*routing.shape, -1)
        probabilities = logits.float().softmax(-1).view(*routing.shape, -1)
        mixed = (self._attend if self.routing_options["kind"] == "attention" else self._compare)(
            routing, inputs, probabilities
        ).flatten(0, 1)
        values, index = mixed.topk(weights.shape[-1], dim=-1)
        if self.routing_options["is_normalized"]:
            values = values / values.sum(-1, keepdim=True)
        log = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
        return log.to(logits.dtype), (self.routing_options["scale"] * values).to(weights.dtype), index

    def _compare(self, routing: Routing, inputs: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Return r by similarity, [B, S, E]."""
        inputs, (known, all_probabilities) = inputs.float(), self._with_past(routing, inputs, probabilities)
        if self.routing_options["normalize"]:
            inputs, known = functional.normalize(inputs, dim=-1), functional.normalize(known, dim=-1)
        scores = self.similarity(inputs) @ known.mT / self.routing_options["tau"]
        return _average(scores, self._visible(routing, known), all_probabilities)

    def _attend(self, routing: Routing, inputs: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Return r by the head whose rows of this text had the lowest mean entropy so far, [B, S, E]."""
        weights = cast(torch.Tensor, routing.weights).float()
        entropy = torch.special.entr(weights.detach()).sum(-1).mT
        known, record = self._with_past(routing, inputs, torch.cat([probabilities, entropy], dim=-1))
        all_probabilities, entropies = record.split([probabilities.shape[-1], entropy.shape[-1]], dim=-1)
        # A window of attention knows the last tokens alone.
        weights = functional.pad(weights, (known.shape[1] - weights.shape[-1], 0))
        visible = self._visible(routing, known)
        head = (visible.float() @ entropies / visible.sum(-1, keepdim=True)).argmin(-1)
        chosen = weights.gather(1, head[:, None, :, None].expand(-1, 1, -1, weights.shape[-1]))[:, 0]
        scores = chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()
        if (sigma := self.routing_options["sigma"]) is not None:
            nearness = functional.normalize(inputs.float(), dim=-1) @ functional.normalize(known, dim=-1).mT
            scores = scores + nearness / sigma**2  # -|u_i - u_j|^2 / 2 sigma^2, up to what all tokens share
        return _average(scores, visible, all_probabilities)

    def _with_past(
        self, routing: Routing, inputs: torch.Tensor, record: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs [B, K, D], in float32, and what is recorded [B, K, R], of all tokens up to now."""
        cache, seen, known = routing.cache, routing.tokens.seen, 0
        if cache is not None:
            if type(cache) is not DynamicCache:  # a family's own subclass may count its layers
                raise ValueError(
                    f"What similarity routing keeps of past tokens lies in a DynamicCache, not a "
                    f'{type(cache).__name__}: take cache_implementation="dynamic", or use_cache=False.'
                )
            while len(cache.layers) <= self.cache_index:
                cache.layers.append(DynamicLayer())
            known = cache.layers[self.cache_index].get_seq_length()
        if known != seen:
            raise ValueError(
                f"The cache holds {seen} tokens, of which the routers know {known}: begin with an empty cache, which "
                "this model alone fills, and without gradient checkpointing."
            )
        if cache is not None:
            kept, values = cache.layers[self.cache_index].update(inputs[:, None], record[:, None])
            inputs, record = kept[:, 0], values[:, 0]
        return inputs.float(), record

    def _visible(self, routing: Routing, known: torch.Tensor) -> torch.Tensor:
        """Return which tokens each token may see, bool [B, S, K]; itself, if nothing else."""
        (batch, length), count = routing.shape, known.shape[1]
        places = torch.arange(count, device=known.device)
        own = places[-length:, None]
        visible = (places <= own if self.is_causal else places >= 0).expand(batch, length, count)
        mask, texts, _ = routing.tokens
        if mask is not None and mask.shape[-1] != count:
            raise ValueError(
                f"attention_mask tells of {mask.shape[-1]} tokens, and with the cache's there are {count}."
            )
        if mask is not None:
            visible = visible & mask[:, None].bool()
        if texts is not None and routing.cache is None:
            visible = visible & (texts[:, :, None] == texts[:, None])
        return visible | (places == own)


def _average(scores: torch.Tensor, visible: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the probabilities [B, K, E] averaged by the softmax of the scores [B, S, K], [B, S, E]."""
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ probabilities


def _install(stack: nn.ModuleList, width: int, options: dict[str, Any]) -> None:
    """Re-class the layers of a stack, and their routers and attention."""
    for index, layer in enumerate(cast(Any, stack)):
        router, attention = router_of(layer), attention_of(layer)
        layer.__class__ = subclass(RoutingLayer, type(layer))
        layer.routing_parts = ()
        if router is None:
            continue
        layer.routing_parts = (router,)
        router.__class__ = subclass(SimilarityRouter, type(router))
        router.is_causal = attention is None or attention.is_causal
        router.routing_options, router.cache_index, router.routing = dict(options), len(stack) + index, None
        if options["kind"] == "attention":
            attention.__class__ = subclass(RoutingAttention, type(attention))
            attention.routing = None
            layer.routing_parts = (router, attention)
            continue
        weight = next(router.parameters())
        router.similarity = SimilarityMatrix(width).to(weight.device, weight.dtype)
        if not weight.is_meta:
            router.similarity.init_weights(0.0)


def router_of(layer: nn.Module) -> Any:
    """Return what picks the experts of a layer; None where it has no experts, or none of the usual names.

    Also in a layer that a variant changed.
    """
    path = block_path(layer)
    children = dict(layer.get_submodule(path).named_children()) if path else {}
    return children.get("gate", children.get("router"))


def attention_of(layer: nn.Module) -> Any:
    """Return a layer's attention; None where it has none of the usual kind."""
    return next((child for child in layer.children() if "is_causal" in vars(child)), None)


def _tell_layers(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the mask, the packed texts and the number of past tokens on to the layers."""
    given = dict(zip(module.forward_arguments, args, strict=False)) | kwargs
    mask, positions, cache = (given.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    for name, value in (("attention_mask", mask), ("position_ids", positions)):
        if value is not None and (not isinstance(value, torch.Tensor) or value.dim() != 2):
            raise ValueError(f"Similarity routing needs {name} as a tensor [B, S], and reads no other form of it.")
    seen = 0 if cache is None else cache.get_seq_length()
    # As the attention does, which does not separate texts where there is a mask, or a cache.
    texts = find_packed_sequence_indices(positions) if positions is not None and mask is None else None
    return args, kwargs | {"routing_tokens": Tokens(mask, texts, seen)}


def __getattr__(name: str) -> type[Any]:
    return generated_in((SimilarityRoutingModel, RoutingLayer, RoutingAttention, SimilarityRouter), name)
