"""Experts merged softly, segment by segment (Lory). This file travels with its checkpoints.

A text is cut into segments of T tokens. The router reads the mean of the hidden states of the segment before and
weighs all experts, whose weights are summed into one FFN for the whole segment: `theta = sum_i e_i theta_i`. The first
segment has none before it and is routed by its own mean, through which no gradient passes. `generate` routes once, by
the mean of the prompt, and computes what follows with the experts merged then, as a dense model would.

A token of the first segment is thus computed with weights that know all of that segment; from the second segment on
nothing that comes later in the text is known.

Source: Zhong, Xia, Chen and Lewis, Lory (COLM 2024, arXiv 2405.03133), sections 2 and 3.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, become, check_counts, generated_in, subclass
from hf_mcsmoe.variants.stacks_mcsmoe import block_path, stacks

WEIGHTS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}


class LoryModel(VariantModel):
    """A model whose experts are merged for each segment."""

    prefix: ClassVar[str] = "Lory"

    def install(self: Any, **options: Any) -> None:
        """Let every block of experts route segments and merge.

        Raises:
            ValueError: there are no experts of the library's stacked layout behind a router of its own.
        """
        found = list(stacks(self))
        owners = [owner for owner, _ in found]
        blocks = [layer.get_submodule(path) for _, stack in found for layer in stack if (path := block_path(layer))]
        parts = [part for block in blocks for part in _parts(block)]
        if not parts or not all(isinstance(owner, PreTrainedModel) for owner in owners):
            raise ValueError(
                f"{type(self).__name__} has no layers with a block of experts, so there is none to merge."
            )
        for part, mixin in parts:
            part.__class__ = subclass(mixin, type(part))
            part.segments = part.prompt = None
            part.weight_names = list(part._parameters)
        for _, stack in found:
            for layer in stack:
                layer.__class__ = subclass(LoryLayer, type(layer))
                layer.segment_length = options["segment_length"]
        for owner in owners:
            owner.prompt_length = None
            owner.register_forward_pre_hook(_tell_layers, with_kwargs=True)

    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue a prompt with the experts merged for it; takes the arguments of Transformers' `generate`.

        Raises:
            ValueError: the prompt is not read in one forward (`prefill_chunk_size`, an assistant, a filled cache).
        """
        given = [
            value for value in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if value is not None
        ]
        with routed_by_prompt(self, given[0].shape[1] if given else 1):
            return super().generate(inputs, *args, **kwargs)


class LoryLayer(nn.Module):
    """Mixin of a layer: takes where the text is, and tells its router and its experts."""

    prefix: ClassVar[str] = "LoryLayerOf"
    segment_length: int

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer.

        Args:
            hidden_states: [B, S, D].
            text_mask: among the keywords, [B, S], 0 for padding; None where all is text.
        """
        if "text_mask" not in kwargs:
            raise ValueError(
                f"{type(self).__name__} is not told where the text is: soft_merge does not serve this family."
            )
        mask = kwargs.pop("text_mask")
        parts: list[Any] = [part for part in self.modules() if isinstance(part, (LoryRouter, LoryExperts))]
        for part in parts:
            length = self.segment_length if part.prompt is None else hidden_states.shape[1]
            part.segments = Segments(hidden_states.shape[:2], length, mask)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:  # also where a checkpoint, recomputing, stops in the middle
            for part in parts:
                part.segments = None


class Segments:
    """The tokens of a batch cut into segments: those of each row's text in order, and its padding behind them."""

    def __init__(self, shape: torch.Size, length: int, mask: torch.Tensor | None) -> None:
        """Cut [B, S] tokens into segments of `length`, whatever side the padding of `mask` [B, S] is on."""
        self.batch, self.size, self.length = shape[0], shape[1], length
        self.count = -(-self.size // length)
        self.order = None if mask is None else (mask == 0).int().argsort(dim=1, stable=True)
        self.mask = mask

    def cut(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [B S, D] as segments [B, N, T, D]."""
        rows = tokens.reshape(self.batch, self.size, -1)
        if self.order is not None:
            rows = rows.gather(1, self.order[..., None].expand_as(rows))
        missing = self.count * self.length - self.size
        return functional.pad(rows, (0, 0, 0, missing)).unflatten(1, (self.count, self.length))

    def joined(self, segments: torch.Tensor) -> torch.Tensor:
        """Return segments [B, N, T, D] as tokens [B S, D], where `cut` took them from."""
        rows = segments.flatten(1, 2)[:, : self.size]
        if self.order is not None:
            rows = rows.gather(1, self.order.argsort(dim=1)[..., None].expand_as(rows))
        return rows.reshape(self.batch * self.size, -1)

    def repeated(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of segments [B, N, D] for each of their tokens, [B S, D]."""
        return self.joined(values[:, :, None].expand(-1, -1, self.length, -1))

    def means(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean over the text of each segment, [B, N, D], in float32."""
        mask = tokens.new_ones(self.batch, self.size) if self.mask is None else self.mask
        is_text = self.cut((mask != 0).float())
        return (self.cut(tokens).float() * is_text).sum(dim=2) / is_text.sum(dim=2).clamp_min(1)


class LoryRouter(nn.Module):
    """Mixin of a router: weighs all experts for each segment."""

    prefix: ClassVar[str] = "LoryRouterOf"
    # While a layer is computed.
    segments: Segments | None
    # While `generate` runs, what was decided for the prompt.
    prompt: dict[str, torch.Tensor] | None

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits and weights of each token's segment, both [B S, E], and the numbers of the experts.

        Args:
            hidden_states: [B S, D].
        """
        segments = self.segments
        if self.prompt:
            logits = self.prompt["logits"]
        else:
            means = segments.means(hidden_states)
            before = torch.cat([means[:, :1], means[:, :-1]], dim=1).to(self.weight.dtype)
            logits = functional.linear(before, self.weight, self._parameters.get("bias"))
            logits = torch.cat([logits[:, :1].detach(), logits[:, 1:]], dim=1)
        if self.prompt is not None:
            self.prompt["logits"] = logits
        weights = logits.float().softmax(dim=-1).to(hidden_states.dtype)
        index = torch.arange(logits.shape[-1], device=logits.device).expand(len(hidden_states), -1)
        return segments.repeated(logits), segments.repeated(weights), index


class LoryExperts(nn.Module):
    """Mixin of a container of experts: computes each segment with one FFN, merged of all of them."""

    prefix: ClassVar[str] = "LoryExpertsOf"
    # As of `LoryRouter`.
    segments: Segments | None
    prompt: dict[str, torch.Tensor] | None
    # All weights and biases, also those that adapters compute from others.
    weight_names: list[str]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the output [B S, D] of the merged experts.

        Args:
            hidden_states: [B S, D].
            top_k_index: of all experts, [B S, E].
            top_k_weights: [B S, E], the same for all tokens of a segment.
        """
        segments = self.segments
        values = segments.cut(hidden_states).flatten(0, 1)
        weights = self.prompt or self.merged(segments.cut(top_k_weights)[:, :, 0].flatten(0, 1))
        if self.prompt is not None:
            self.prompt.update(weights)
        output = self._compute(values, weights)
        return segments.joined(output.unflatten(0, (segments.batch, segments.count)))

    def merged(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return every matrix and bias of the experts summed with weights [G, E], as [G, ...]."""
        parameters = {name: getattr(self, name) for name in self.weight_names}
        return {name: torch.tensordot(weights.to(value.dtype), value, dims=1) for name, value in parameters.items()}

    def _compute(self, values: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the FFNs' outputs [G, T, D] for values [G, T, D]."""
        inner = self._linear("gate_up_proj" if self.has_gate else "up_proj", values, weights)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return self._linear("down_proj", inner, weights)

    def _linear(self, name: str, values: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        matrix, bias = weights[name], weights.get(f"{name}_bias")
        product = values @ (matrix if self.is_transposed else matrix.mT)
        return product if bias is None else product + bias[:, None]


def soft_merge(model: PreTrainedModel, *, segment_length: int = 256) -> PreTrainedModel:
    """Let a Mixture-of-Experts model merge its experts for each segment; changed in place, and returned.

    Experts that were trained to be picked token by token do not sum to one that is worth as much: the model is to be
    trained. A dense model becomes one to begin with by `upcycle_dense([model] * 8, "mixtral")`, all of whose experts
    are copies; train it densely for some steps before, and softly after. Where no text is longer than a segment, the
    routers get no gradient.

    Args:
        segment_length: T, how many tokens are computed with the same merged experts.

    Raises:
        ValueError: `segment_length` is no whole number from 1 on, or the model has no experts of the library's stacked
            layout behind routers of their own.
    """
    check_counts(segment_length=segment_length)
    become(model, LoryModel, {"segment_length": segment_length})
    return model


@contextlib.contextmanager
def routed_by_prompt(model: nn.Module, length: int) -> Iterator[None]:
    """Let a model merge its experts once, in its next forward, by the mean of all of the text, and keep them.

    Args:
        length: how many tokens, padding too, that forward has to read.
    """
    # Not by their classes, which a checkpoint's own code has as well.
    parts = [module for module in model.modules() if {"segments", "prompt"} <= vars(module).keys()]
    owners = [module for module in model.modules() if "prompt_length" in vars(module)]
    for part in parts:
        part.prompt = {}
    for owner in owners:
        vars(owner)["prompt_length"] = length
    try:
        yield
    finally:
        for part in parts:
            part.prompt = None
        for owner in owners:
            vars(owner)["prompt_length"] = None


def _parts(block: Any) -> list[tuple[Any, type]]:
    """Return the router and the experts of a block, each with the mixin that it becomes.

    Raises:
        ValueError: they are not of the library's stacked layout.
    """
    experts = block.experts
    is_stacked = {"has_gate", "is_transposed"} <= vars(experts).keys() and "down_proj" in experts._parameters
    routers = [
        child
        for child in block.children()
        if is_stacked and not isinstance(child, nn.Linear) and _is_router(child, len(experts.down_proj))
    ]
    if len(routers) != 1 or not experts._parameters.keys() <= WEIGHTS or experts.has_post_expert_norm:
        raise ValueError(
            f"{type(block).__name__} is no router in front of experts of the library's stacked layout, so its experts "
            "cannot be merged softly: soft_merge serves Mixtral, Qwen3-MoE, OLMoE and families built like them."
        )
    return [(routers[0], LoryRouter), (experts, LoryExperts)]


def _is_router(module: nn.Module, num_experts: int) -> bool:
    weight = module._parameters.get("weight")
    return module._parameters.keys() <= {"weight", "bias"} and weight is not None and len(weight) == num_experts


def _tell_layers(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand the layers where the text is, by a keyword; refuse what would be routed by another text than it says."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if module.prompt_length == 0:  # a later forward of `generate`, for which all is decided
        return args, kwargs | {"text_mask": None}
    if module.prompt_length is None:
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError(
                "A forward that continues a cache cannot see the segment before, by which its experts are merged: "
                "call generate, or give the whole text without past_key_values."
            )
    else:
        _check_prompt(module, kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None))
        module.prompt_length = 0
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise ValueError(
            "The experts are merged by the mean of the text, which only an attention_mask [B, S] tells from padding: "
            "give such a mask, and a cache that is not static."
        )
    return args, kwargs | {"text_mask": mask}


def _check_prompt(module: Any, embeds: torch.Tensor | None, ids: torch.Tensor | None) -> None:
    size = (ids if embeds is None else embeds).shape[1]
    if size != module.prompt_length:
        raise ValueError(
            f"The first forward of generate reads {size} tokens of a prompt of {module.prompt_length}, and experts "
            "are merged by all of it: generate from an empty cache, without prefill_chunk_size or an assistant."
        )


def __getattr__(name: str) -> type[Any]:
    return generated_in((LoryModel, LoryLayer, LoryRouter, LoryExperts), name)
