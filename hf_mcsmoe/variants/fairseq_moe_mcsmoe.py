"""GPT-type Mixture-of-Experts models of fairseq (`moe_lm`), on XGLM or OPT. This file travels with its checkpoints.

fairseq's dense decoder is Transformers' XGLM (sinusoidal positions, scaled embeddings) or OPT (learned positions);
some of its layers have experts in the place of their MLP, of which a token gets two. fairseq limits how many tokens
an expert takes of a batch; here it takes all that are sent to it.

Source: Artetxe and others, Efficient Large Scale Language Modeling with Mixtures of Experts (EMNLP 2022, arXiv
2112.10684).
"""

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init

from hf_mcsmoe.variants.remote_mcsmoe import VariantModule, generated_in, subclass
from hf_mcsmoe.variants.variant_experts_mcsmoe import ModelWithExperts, VariantExperts

# Layers that are built like fairseq's.
LAYERS = ("XGLMDecoderLayer", "OPTDecoderLayer")


class FairseqMoeModel(ModelWithExperts):
    """A dense decoder with experts in some of its layers."""

    prefix: ClassVar[str] = "FairseqMoe"

    def install(self: Any, **options: Any) -> None:
        """Put empty experts in the place of the MLPs of some layers: `layers`, and the sizes of `FairseqMoeBlock`.

        Raises:
            ValueError: a layer is not there.
        """
        found, wanted = list(_decoder_layers(self)), options["layers"]
        if lacking := sorted(set(wanted) - set(range(len(found)))):
            raise ValueError(
                f"{type(self).__name__} has {len(found)} layers like fairseq's, and no layer {lacking[0]}."
            )
        sizes = {name: value for name, value in options.items() if name != "layers"}
        for layer in cast(Any, [found[index] for index in wanted]):
            block = FairseqMoeBlock(self.config, layer.fc1, layer.activation_fn, **sizes)
            for name in ("fc1", "activation_fn", "fc2"):
                delattr(layer, name)
            layer.moe_layer, layer.activation_dropout = block, 0.0
            layer.__class__ = subclass(FairseqMoeLayer, type(layer))


class FairseqMoeLayer(nn.Module):
    """Mixin of a decoder layer, whose forward calls what its MLP was made of: the experts come first, and alone."""

    prefix: ClassVar[str] = "FairseqMoeLayerOf"

    def fc1(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the experts, [..., D]."""
        return self.moe_layer(hidden_states)

    def activation_fn(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what it is given: experts have their activation inside."""
        return hidden_states

    def fc2(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what it is given."""
        return hidden_states


class Top2Gate(VariantModule):
    """The router: picks the experts of the largest probabilities, which are divided by their sum."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def init_weights(self, std: float) -> None:
        """Draw the weight as the family draws that of a linear layer."""
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, N], the weights of the experts picked, and the experts, both [T, k].

        Args:
            hidden_states: [T, D].
        """
        logits = functional.linear(hidden_states, self.weight)
        values, index = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).eps)
        return logits, weights.to(hidden_states.dtype), index


class FairseqMoeBlock(nn.Module):
    """A router and its experts, each an MLP with biases."""

    def __init__(
        self, config: Any, like: nn.Linear, act_fn: nn.Module, *, num_experts: int, expert_dim: int, top_k: int
    ) -> None:
        """Make empty weights, on the device and of the dtype of the dense layer's.

        Args:
            like: the first matrix of the MLP that was here.
            num_experts: N.
            expert_dim: F.
            top_k: how many experts a token gets.
        """
        super().__init__()
        with like.weight.device:
            self.gate = Top2Gate(like.in_features, num_experts, top_k)
            self.experts = cast(Any, VariantExperts)(config, num_experts, (expert_dim, like.in_features), act_fn)
            self.experts.allocate(has_gate=False, has_bias=True)
        self.to(like.weight.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the experts that the router picks, [B, S, D] or [T, D]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, weights).reshape(hidden_states.shape)


def _decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__ in LAYERS)


def __getattr__(name: str) -> type[Any]:
    return generated_in((FairseqMoeModel, FairseqMoeLayer), name)
