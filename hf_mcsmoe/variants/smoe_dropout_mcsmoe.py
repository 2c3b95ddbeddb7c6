"""Dense models as SMoEs with frozen random routers (SMoE-Dropout). This file travels.

The hidden units of an MLP are split evenly among N experts, of which a random router that is never trained picks k; k
grows during training from few to all (elastic_top_k.py), so that the trained model can be served with whatever k there
is time for.

Source: Chen, Zhang, Jaiswal, Liu and Wang, Sparse MoE as the New Dropout (ICLR 2023, arXiv 2303.01610).
"""

import math
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_mcsmoe.variants.dense_mlps_mcsmoe import activation, dense_mlps, matrix, projections
from hf_mcsmoe.variants.remote_mcsmoe import VariantModule, become, check_counts, generated_in
from hf_mcsmoe.variants.variant_experts_mcsmoe import ModelWithExperts, VariantExperts

# How far the experts, all of them, may be from the MLP that they were made of, relative to its output.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
GATE_SCALES = ("exact", "softmax")


class SmoeDropoutModel(ModelWithExperts):
    """A dense model whose MLPs are SMoE blocks."""

    prefix: ClassVar[str] = "SmoeDropout"

    def install(self: Any, **options: Any) -> None:
        """Put a block in the place of each MLP, with its weights where it has some.

        Raises:
            ValueError: there is no MLP that can be split, or a width is no multiple of the number of experts.
        """
        found = list(dense_mlps(self))
        if not found:
            raise ValueError(
                f"{type(self).__name__} has no MLP of the layouts that can be split into experts (Llama's, Phi's, "
                "GPT-2's or GPT-NeoX's)."
            )
        blocks = [MoefiedMLP(self.config, mlp, **options) for _, _, mlp in found]
        for (_, _, mlp), block in zip(found, blocks, strict=True):
            if not block.gate.weight.is_meta:
                block.check_same(mlp)
        for (parent, name, _), block in zip(found, blocks, strict=True):
            setattr(parent, name, block)


class FrozenRouter(VariantModule):
    """A random linear layer, kept in buffers so that nothing trains it.

    `top_k` is how many experts it picks; `gate_scale` see `moefy_dense`.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, gate_scale: str) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.gate_scale = num_experts, top_k, gate_scale
        self.register_buffer("weight", torch.empty(num_experts, hidden_size))
        self.register_buffer("bias", torch.empty(num_experts))

    def init_weights(self, std: float) -> None:
        """Draw the router as a linear layer is drawn by default."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for tensor in (self.weight, self.bias):
            init.uniform_(tensor, -bound, bound)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, N], the weights of the experts picked, and the experts, both [T, k].

        Args:
            hidden_states: [T, D].
        """
        logits = functional.linear(hidden_states, self.weight, self.bias)
        values, index = logits.topk(self.top_k, dim=-1)
        if self.gate_scale == "softmax":
            return logits, values.float().softmax(dim=-1).to(values.dtype), index
        return logits, torch.full_like(values, self.num_experts / self.top_k), index


class MoefiedMLP(nn.Module):
    """An MLP as an SMoE block; its `gate` picks the experts, as in most of the library's families."""

    def __init__(self, config: Any, mlp: nn.Module, *, num_experts: int, top_k: int, gate_scale: str) -> None:
        """Split an MLP, of whose weights copies are taken unless they are on the meta device.

        Raises:
            ValueError: its width is no multiple of the number of experts.
        """
        super().__init__()
        gate, up, down = projections(mlp)
        (width, hidden_size), has_bias = matrix(up).shape, up.bias is not None or down.bias is not None
        if width % num_experts:
            raise ValueError(
                f"An MLP of {width} hidden units cannot be split evenly into {num_experts} experts: choose a divisor "
                f"of {width}."
            )
        self.gate = FrozenRouter(hidden_size, num_experts, top_k, gate_scale)
        self.experts = cast(Any, VariantExperts)(
            config, num_experts, (width // num_experts, hidden_size), activation(mlp)
        )
        self.experts.allocate(gate is not None, has_bias)
        self.dropout = dict(mlp.named_children()).get("dropout", nn.Identity())
        self.to(up.weight.device, up.weight.dtype)
        if up.weight.is_meta:
            return
        self.gate.init_weights(0.0)
        with torch.no_grad():
            _fill(self.experts, gate, up, down)
        self.train(mlp.training)

    @torch.no_grad()
    def check_same(self, mlp: nn.Module) -> None:
        """Compare with the MLP on random inputs, with all experts.

        Raises:
            ValueError: the MLP computes something else.
        """
        weight, (top_k, scale) = self.gate.weight, (self.gate.top_k, self.gate.gate_scale)
        tokens = torch.randn(1, 4, weight.shape[1], dtype=weight.dtype, device=weight.device)
        modes = self.training, mlp.training
        self.gate.top_k, self.gate.gate_scale = self.gate.num_experts, "exact"
        expected, found = mlp.eval()(tokens), self.eval().exact(tokens)
        self.gate.top_k, self.gate.gate_scale = top_k, scale
        self.train(modes[0]), mlp.train(modes[1])
        distance = float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
        if not distance <= TOLERANCE.get(weight.dtype, 0.05):
            raise ValueError(
                f"{type(mlp).__name__} computes something else than its projections and its activation do, so it "
                f"cannot be split into experts: the outputs differ by {distance:.2g} of their norm."
            )

    def exact(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what `forward` does, by the plain implementation of the experts."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        return type(self.experts).forward.__wrapped__(self.experts, flat, index, weights).reshape(hidden_states.shape)

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """Compute the experts that the router picks, [B, S, D] or [T, D]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(flat)
        return self.dropout(self.experts(flat, index, weights).reshape(hidden_states.shape))


def moefy_dense(
    model: PreTrainedModel,
    num_experts: int,
    *,
    top_k: int | None = None,
    gate_scale: str = "exact",
    seed: int | None = None,
) -> PreTrainedModel:
    """Turn the MLPs of a dense model into SMoE blocks with frozen random routers; changed in place, and returned.

    Args:
        num_experts: N, a divisor of the width of every MLP.
        top_k: k, how many experts a token gets; None for all, which is the dense model.
        gate_scale: "exact" weighs each expert picked by N / k, so that k = N is the dense model to the last bits and
            fewer keep its scale; "softmax" by the softmax over the k picked, as in the paper, which trains from
            scratch: its output is an average of experts, about 1 / N of the dense model's.
        seed: of the routers; None goes on with torch's.

    Raises:
        ValueError: a number is out of its range, `gate_scale` is unknown, or the model has no MLP that can be split.
    """
    top_k = num_experts if top_k is None else top_k
    if num_experts < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(f"Needs 1 <= top_k <= num_experts, not top_k={top_k} and num_experts={num_experts}.")
    check_counts(top_k=top_k, num_experts=num_experts)
    if gate_scale not in GATE_SCALES:
        raise ValueError(f"gate_scale must be one of {', '.join(GATE_SCALES)}, not {gate_scale!r}.")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        become(model, SmoeDropoutModel, {"num_experts": num_experts, "top_k": top_k, "gate_scale": gate_scale})
    return model


def _fill(experts: Any, gate: Any, up: Any, down: Any) -> None:
    """Give each expert its share of the hidden units, and an N-th of the output's bias."""
    count = experts.num_experts
    ups = [projection for projection in (gate, up) if projection is not None]
    target = "gate_up_proj" if experts.has_gate else "up_proj"
    split = [matrix(projection).unflatten(0, (count, -1)) for projection in ups]
    weights = dict(experts.named_parameters(recurse=False))
    weights[target].copy_(torch.cat(split, dim=1))
    weights["down_proj"].copy_(matrix(down).unflatten(1, (count, -1)).transpose(0, 1))
    if experts.has_bias:
        biases = [_bias(projection).unflatten(0, (count, -1)) for projection in ups]
        weights[f"{target}_bias"].copy_(torch.cat(biases, dim=1))
        weights["down_proj_bias"].copy_(_bias(down) / count)


def _bias(projection: Any) -> torch.Tensor:
    return matrix(projection).new_zeros(len(matrix(projection))) if projection.bias is None else projection.bias


def __getattr__(name: str) -> type[Any]:
    return generated_in((SmoeDropoutModel,), name)
