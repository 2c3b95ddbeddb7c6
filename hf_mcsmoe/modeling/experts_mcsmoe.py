"""Merged experts: the modules that stand where a model's experts stood. This file travels with every checkpoint."""

from typing import ClassVar

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .forward_mcsmoe import eager_experts_forward, grouped_experts_forward, merge_picks
from .losparse_mcsmoe import LowRankSparse


class MergedExperts(LowRankSparse):
    """G stored experts behind a router that knows E; first base of every generated experts class.

    The stacked parameters keep the names and the layout of the family, with G rows instead of E. Those stored as low
    rank + sparse are never transposed, whatever the layout.
    """

    expert_map: torch.Tensor
    low_rank: ClassVar[dict[str, dict]] = {}
    sparse_columns = ("down_proj",)
    # Whether the base family lets its configuration choose how the product is computed.
    follows_config = True

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the picked experts' outputs, [T, D], as the base class does.

        Args:
            hidden_states: [T, D].
            top_k_index: int [T, K], the router's picks in [0, E).
            top_k_weights: [T, K].
        """
        index, weights = merge_picks(self.expert_map, top_k_index, top_k_weights, self.num_experts)
        # A loop over experts breaks a graph, and means many small launches on an accelerator; the CPU is faster so.
        looped = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.low_rank:
            product = eager_experts_forward if looped else grouped_experts_forward
            return product(self, hidden_states, index, weights)
        fastest = "eager" if looped else "grouped_mm"
        implementation = self.config._experts_implementation if self.follows_config else fastest
        if implementation == "grouped_mm":  # Transformers' own copies all products to blank those of no expert
            return grouped_experts_forward(self, hidden_states, index, weights)
        run = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, eager_experts_forward)
        return run(self, hidden_states, index, weights)

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Return (G, out, in) of a stacked weight."""
        count, out, width = getattr(self, name).shape
        return (count, width, out) if self.is_transposed else (count, out, width)

    def set_expert_map(self, expert_map: list[int], device: torch.device | None = None) -> None:
        """Set the map int [E] -> [G] and G itself. The map is kept in the configuration, not among the weights."""
        values = torch.tensor(expert_map, dtype=torch.long, device=device)
        self.num_experts = max(expert_map) + 1
        self.expert_map_values = list(expert_map)
        self.register_buffer("expert_map", values, persistent=False)
        # Tells the products of Transformers to drop the index `num_experts`.
        self._is_expert_parallel = True


class StackedExperts(MergedExperts):
    """Merged experts of a family outside the experts interface, stored in that interface's default layout.

    Parameters: `gate_up_proj [G, 2F, D]` (gate rows first) or, ungated, `up_proj [G, F, D]`; `down_proj [G, D, F]`.
    """

    follows_config = False

    def __init__(self, expert_map: list[int], sizes: tuple[int, int], act_fn: nn.Module, has_gate: bool) -> None:
        """Make empty experts of `sizes` (D, F)."""
        super().__init__()
        self.act_fn, self.has_gate = act_fn, has_gate
        self.has_bias = self.is_transposed = self.has_post_expert_norm = False
        self.is_concatenated = True
        self.set_expert_map(expert_map)
        hidden_size, width = sizes
        up = torch.empty(self.num_experts, 2 * width if has_gate else width, hidden_size)
        self.register_parameter("gate_up_proj" if has_gate else "up_proj", nn.Parameter(up))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class MergedSwitchSparseMLP(nn.Module):
    """Sparse MLP of a Switch Transformer with G merged experts in stacked tensors instead of a module per expert.

    The router is the original one with its E outputs and its capacity; tokens over capacity get zero, as before.
    """

    def __init__(self, router: nn.Module, experts: StackedExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` [batch, length, D] to the same shape."""
        dispatch, probabilities, _ = self.router(hidden_states)  # [B, S, E] one-hot or zero, [B, S, 1], [B, S, E]
        index = dispatch.argmax(-1).view(-1, 1)
        weights = (probabilities * dispatch.any(-1, keepdim=True)).view(-1, 1)
        output = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), index, weights)
        return output.view_as(hidden_states)


class MergedLlama4TextMoe(nn.Module):
    """Llama 4's block with merged experts. The score multiplies an expert's *input*, so picks are never summed.

    Only the picked experts run; the original runs all of them, on zeros where they were not picked.
    """

    def __init__(self, block: nn.Module, experts: StackedExperts) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, experts
        self.hidden_dim, self.top_k = block.hidden_dim, block.top_k

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `hidden_states` [..., D] to the output [T, D] and the router logits [T, E]."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(hidden_states)
        index = logits.topk(self.top_k, dim=1).indices  # [T, K]
        routed = hidden_states[:, None, :] * scores.gather(1, index)[:, :, None]  # [T, K, D]
        ones = routed.new_ones(index.numel(), 1)
        output = self.experts(routed.flatten(0, 1), index.reshape(-1, 1), ones).view_as(routed).sum(1)
        return self.shared_expert(hidden_states) + output, logits


class MergedJetMoeMoE(nn.Module):
    """JetMoE's feed-forward block with merged experts (its attention experts are another module and stay)."""

    def __init__(self, block: nn.Module, experts: StackedExperts) -> None:
        super().__init__()
        self.router, self.bias, self.experts = block.router, block.bias, experts

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """Map `layer_input` [batch, length, D] to the same shape."""
        hidden_states = layer_input.reshape(-1, layer_input.shape[-1])
        values, index = self.router(hidden_states)[-1].topk(self.router.top_k, dim=1)
        output = self.experts(hidden_states, index, values.softmax(1).type_as(hidden_states))
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
    """LongCat-Flash's experts, merged; picks from E on are its zero-computation experts, which return their input."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Map `hidden_states` [T, D] to the same shape; picks and weights are [T, K]."""
        identity = top_k_index >= self.expert_map.shape[0]
        passed = (top_k_weights * identity).sum(-1, keepdim=True) * hidden_states
        index, weights = top_k_index.masked_fill(identity, 0), top_k_weights.masked_fill(identity, 0)
        return (super().forward(hidden_states, index, weights) + passed).to(hidden_states.dtype)


def _module(parent: nn.Module, path: str) -> nn.Module:
    return parent.get_submodule(path) if path else parent


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(_module(model, parent), child, module)


def _like(module: nn.Module, reference: torch.Tensor) -> nn.Module:
    return module.to(device=reference.device, dtype=reference.dtype).train(module.training)


def _install_switch(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    first = block.experts["expert_0"]
    act_fn = nn.Sequential(first.act, nn.Dropout(first.dropout.p))
    experts = StackedExperts(expert_map, first.wo.weight.shape, act_fn, has_gate=False)
    merged = MergedSwitchSparseMLP(block.router, _like(experts, first.wi.weight))
    _replace(model, block_name, merged.train(block.training))
    return experts


def _install_llama4(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    old = block.experts
    experts = StackedExperts(expert_map, (old.hidden_size, old.expert_dim), old.act_fn, True)
    _replace(model, block_name, MergedLlama4TextMoe(block, _like(experts, old.down_proj)).train(block.training))
    return experts


def _install_jetmoe(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    block = model.get_submodule(name)
    sizes = (block.input_size, block.hidden_size)
    experts = StackedExperts(expert_map, sizes, block.activation, True)
    merged = MergedJetMoeMoE(block, _like(experts, block.input_linear.weight))
    _replace(model, name, merged.train(block.training))
    return experts


def _install_dbrx(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    old = model.get_submodule(name)
    sizes = (old.hidden_size, old.ffn_hidden_size)
    experts = MergedDbrxExperts(expert_map, sizes, old.mlp.activation_fn, True)
    _replace(model, name, _like(experts, old.mlp.w1).train(old.training))
    return experts


def _install_longcat(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    old = model.get_submodule(name)
    sizes = (old.hidden_size, old.intermediate_size)
    experts = MergedLongcatFlashExperts(expert_map, sizes, old.act_fn, True)
    _replace(model, name, _like(experts, old.down_proj).train(old.training))
    return experts


def _install_fused(model: nn.Module, name: str, expert_map: list[int]) -> nn.Module:
    """Shrink experts of the experts interface in place: same class plus `MergedExperts`, same parameter names."""
    experts = model.get_submodule(name)
    num_experts = max(expert_map) + 1
    for key, parameter in list(experts.named_parameters(recurse=False)):
        rows = parameter.data.new_empty(num_experts, *parameter.shape[1:])
        setattr(experts, key, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    vars(experts).pop("_is_hf_initialized", None)
    if not hasattr(experts, "has_gate"):  # the interface's default layout without its decorator (Step 3.7)
        experts.follows_config, experts.has_gate, experts.is_concatenated = False, True, True
        experts.has_bias = experts.is_transposed = experts.has_post_expert_norm = False
    experts.set_expert_map(expert_map)
    return experts


# Experts outside the experts interface, by the class of the container. Names, because the same library class may be
# reached through several modules, and importing six families to load one of them would be waste.
INSTALLERS = {
    "SwitchTransformersExperts": _install_switch,
    "Llama4TextExperts": _install_llama4,
    "JetMoeMoE": _install_jetmoe,
    "DbrxExperts": _install_dbrx,
    "LongcatFlashExperts": _install_longcat,
}


def install_merged_experts(model: nn.Module, name: str, expert_map: list[int]) -> MergedExperts:
    """Replace the experts container `name` of `model` by G empty merged experts, on its device and in its dtype.

    Experts of the experts interface become instances of the class that `merged_class` of the modelling file makes of
    their own class; that is the caller's part, since it needs the module that can name the class.

    Args:
        expert_map: int [E] -> [G], onto 0 .. G-1.
    """
    container = type(model.get_submodule(name)).__name__
    experts = INSTALLERS.get(container, _install_fused)(model, name, expert_map)
    device = experts.down_proj.device
    # The map must hold its values also where the weights are yet to come.
    experts.set_expert_map(expert_map, None if device.type == "meta" else device)
    return experts
