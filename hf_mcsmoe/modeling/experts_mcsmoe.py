"""Merged experts: the modules that stand where a model's experts stood. This file travels with every checkpoint."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from .constants_mcsmoe import Constants
from .forward_mcsmoe import merged_experts_forward
from .losparse_mcsmoe import LowRankSparse
from .quantized_mcsmoe import Quantized
from .router_mcsmoe import ExpertMap

# The stacked weights of the experts interface.
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class MergedExperts(LowRankSparse, Quantized, Constants):
    """Stacked experts that compute as this file says: first base of those stored as low rank + sparse or in few bits.

    And of those behind which constants stand. The stacked parameters keep the names and the layout of the family, with
    G rows instead of E. Those stored as low rank + sparse or in few bits are never transposed, whatever the layout.
    """

    low_rank: ClassVar[dict[str, dict]] = {}
    quantized: ClassVar[dict[str, dict]] = {}
    sparse_columns = ("down_proj",)
    picks_meet = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the picked experts' outputs, [T, D].

        Args:
            hidden_states: [T, D].
            top_k_index: int [T, K], stored experts, and constants behind them.
            top_k_weights: [T, K].
        """
        if not self.num_constants:
            return merged_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        constant, index, weights = self.apart(top_k_index, top_k_weights)
        output = merged_experts_forward(self, hidden_states, index, weights)
        return (output + constant).to(output.dtype)

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Return (G, out, in) of a stacked weight or a factor; (N, in) of the kept rows of S."""
        if name in self.quantized:
            return self.quantized_shape(name)
        *stack, out, width = getattr(self, name).shape
        return (*stack, width, out) if self.is_transposed and name in WEIGHTS else (*stack, out, width)

    def by_expert(self, name: str) -> Iterable[Any]:
        """Return each expert's part of a tensor that is one of a weight's factors."""
        return self.quantized_stack(name) if name in self.quantized else super().by_expert(name)


class StackedExperts(MergedExperts):
    """Merged experts of a family outside the experts interface, stored in that interface's default layout.

    Parameters: `gate_up_proj [G, 2F, D]` (gate rows first) or, ungated, `up_proj [G, F, D]`; `down_proj [G, D, F]`.
    """

    def __init__(self, num_experts: int, sizes: tuple[int, int], act_fn: nn.Module, has_gate: bool) -> None:
        """Make G empty experts of `sizes` (D, F)."""
        super().__init__()
        self.num_experts, self.act_fn, self.has_gate = num_experts, act_fn, has_gate
        self.has_bias = self.is_transposed = self.has_post_expert_norm = False
        self.is_concatenated = True
        hidden_size, width = sizes
        up = torch.empty(num_experts, 2 * width if has_gate else width, hidden_size)
        self.register_parameter("gate_up_proj" if has_gate else "up_proj", nn.Parameter(up))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class MergedSwitchSparseMLP(ExpertMap):
    """Sparse MLP of a Switch Transformer with G merged experts in stacked tensors instead of a module per expert.

    The router is the original one with its E outputs and its capacity; tokens over capacity get zero, as before.
    """

    def __init__(self, router: nn.Module, experts: StackedExperts, expert_map: list[int]) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.set_expert_map(expert_map)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` [batch, length, D] to the same shape."""
        dispatch, probabilities, _ = self.router(hidden_states)  # [B, S, E] one-hot or zero, [B, S, 1], [B, S, E]
        index = self.stored(dispatch.argmax(-1).view(-1, 1))
        weights = (probabilities * dispatch.any(-1, keepdim=True)).view(-1, 1)
        output = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), index, weights)
        return output.view_as(hidden_states)


class MergedLlama4TextMoe(ExpertMap):
    """Llama 4's block with merged experts. The score multiplies an expert's *input*, so picks are never summed.

    Only the picked experts run; the original runs all of them, on zeros where they were not picked.
    """

    def __init__(self, block: nn.Module, experts: StackedExperts, expert_map: list[int]) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, experts
        self.hidden_dim, self.top_k = block.hidden_dim, block.top_k
        self.set_expert_map(expert_map)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `hidden_states` [..., D] to the output [T, D] and the router logits [T, E]."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(hidden_states)
        index = logits.topk(self.top_k, dim=1).indices  # [T, K]
        routed = hidden_states[:, None, :] * scores.gather(1, index)[:, :, None]  # [T, K, D]
        ones = routed.new_ones(index.numel(), 1)
        output = self.experts(routed.flatten(0, 1), self.stored(index).reshape(-1, 1), ones).view_as(routed).sum(1)
        return self.shared_expert(hidden_states) + output, logits


class MergedJetMoeMoE(ExpertMap):
    """JetMoE's feed-forward block with merged experts (its attention experts are another module and stay)."""

    def __init__(self, block: nn.Module, experts: StackedExperts, expert_map: list[int]) -> None:
        super().__init__()
        self.router, self.bias, self.experts = block.router, block.bias, experts
        self.set_expert_map(expert_map)

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """Map `layer_input` [batch, length, D] to the same shape."""
        hidden_states = layer_input.reshape(-1, layer_input.shape[-1])
        values, index = self.router(hidden_states)[-1].topk(self.router.top_k, dim=1)
        output = self.experts(hidden_states, self.stored(index), values.softmax(1).type_as(hidden_states))
        return output.view_as(layer_input) + self.bias


class MergedDbrxExperts(StackedExperts):
    """DBRX's experts, merged; they are called with [batch, length, D]."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map `hidden_states` [batch, length, D] to the same shape; picks and weights are [T, K]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view_as(hidden_states)


class MergedLongcatFlashExperts(StackedExperts):
    """LongCat-Flash's experts, merged.

    Picks behind experts and constants are its zero-computation experts, which return their input.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map `hidden_states` [T, D] to the same shape; picks and weights are [T, K]."""
        identity = top_k_index >= self.num_experts + self.num_constants
        passed = (top_k_weights * identity).sum(-1, keepdim=True) * hidden_states
        index, weights = top_k_index.masked_fill(identity, 0), top_k_weights.masked_fill(identity, 0)
        return (super().forward(hidden_states, index, weights) + passed).to(hidden_states.dtype)


def _like(module: StackedExperts, reference: torch.Tensor) -> StackedExperts:
    return module.to(device=reference.device, dtype=reference.dtype)


def _switch(block: Any, num_experts: int, expert_map: list[int]) -> nn.Module:
    first = block.experts["expert_0"]
    act_fn = nn.Sequential(first.act, nn.Dropout(first.dropout.p))
    experts = StackedExperts(num_experts, first.wo.weight.shape, act_fn, has_gate=False)
    return MergedSwitchSparseMLP(block.router, _like(experts, first.wi.weight), expert_map)


def _llama4(block: Any, num_experts: int, expert_map: list[int]) -> nn.Module:
    old = block.experts
    experts = StackedExperts(num_experts, (old.hidden_size, old.expert_dim), old.act_fn, True)
    return MergedLlama4TextMoe(block, _like(experts, old.down_proj), expert_map)


def _jetmoe(block: Any, num_experts: int, expert_map: list[int]) -> nn.Module:
    experts = StackedExperts(num_experts, (block.input_size, block.hidden_size), block.activation, True)
    return MergedJetMoeMoE(block, _like(experts, block.input_linear.weight), expert_map)


def _dbrx(old: Any, num_experts: int, expert_map: list[int]) -> nn.Module:
    sizes = (old.hidden_size, old.ffn_hidden_size)
    return _like(MergedDbrxExperts(num_experts, sizes, old.mlp.activation_fn, True), old.mlp.w1)


def _longcat(old: Any, num_experts: int, expert_map: list[int]) -> nn.Module:
    sizes = (old.hidden_size, old.intermediate_size)
    return _like(MergedLongcatFlashExperts(num_experts, sizes, old.act_fn, True), old.down_proj)


# Experts outside the experts interface, by the class of the container: what makes their module, and whether that
# stands for the whole block. Names, because the same library class may be reached through several modules, and
# importing five families to load one of them would be waste.
OUTSIDE: dict[str, tuple[Callable[[Any, int, list[int]], nn.Module], bool]] = {
    "SwitchTransformersExperts": (_switch, True),
    "Llama4TextExperts": (_llama4, True),
    "JetMoeMoE": (_jetmoe, False),
    "DbrxExperts": (_dbrx, False),
    "LongcatFlashExperts": (_longcat, False),
}


def num_original(container: Any) -> int:
    """Return E of an original experts container."""
    counts: dict[str, Callable[[Any], int]] = {
        "SwitchTransformersExperts": len,
        "JetMoeMoE": lambda block: block.input_linear.num_experts,
        "LongcatFlashExperts": lambda experts: experts.num_routed_experts,
    }
    return counts.get(type(container).__name__, lambda experts: experts.num_experts)(container)


def install_experts(model: nn.Module, path: str, expert_map: list[int], num_experts: int | None = None) -> Any:
    """Replace the experts container at `path` by G empty merged experts, on its device and in its dtype; returns them.

    Args:
        expert_map: int [E] -> [G], onto 0 .. G-1, and behind these constants.
        num_experts: G; None where there are no constants.
    """
    container, num_experts = model.get_submodule(path), num_experts or max(expert_map) + 1
    if type(container).__name__ not in OUTSIDE:
        return _shrink(container, num_experts)
    build, whole_block = OUTSIDE[type(container).__name__]
    path = path.rpartition(".")[0] if whole_block else path
    old, (parent, _, child) = model.get_submodule(path), path.rpartition(".")
    merged = build(old, num_experts, expert_map).train(old.training)
    setattr(model.get_submodule(parent), child, merged)
    return merged.experts if isinstance(merged, ExpertMap) else merged


def _shrink(experts: Any, num_experts: int) -> Any:
    """Leave G empty rows of stacked experts, in place: class and parameters' names stay."""
    for key, parameter in list(experts.named_parameters(recurse=False)):
        rows = parameter.data.new_empty(num_experts, *parameter.shape[1:])
        setattr(experts, key, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    vars(experts).pop("_is_hf_initialized", None)
    experts.num_experts, experts.picks_meet = num_experts, True
    if not hasattr(experts, "has_gate"):  # the interface's default layout without its decorator (Step 3.7)
        experts.has_gate, experts.is_concatenated = True, True
        experts.has_bias = experts.is_transposed = experts.has_post_expert_norm = False
    return experts
