"""The families outside the experts interface: Switch, Llama 4, JetMoE, DBRX, and those refused."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_mcsmoe.layers.fused import FusedLayer
from hf_mcsmoe.layers.layer import MoELayer, Sink
from hf_mcsmoe.methods.experts import Experts

# Containers whose experts cannot be merged, and why.
REFUSED = {
    "NllbMoeExperts": (
        "the installed Transformers runs only its experts 0 and 1, whatever the router picks (the dispatch mask is "
        "one-hot encoded a second time in NllbMoeExperts.forward), so its outputs say nothing about the other experts"
    ),
    "DogeCDMoE": (
        "its experts are single neurons found by product keys: there is nothing to align, and merging two of them "
        "saves less than the map from old to new costs"
    ),
}


class Llama4Layer(MoELayer):
    """Llama 4: transposed, gated; sigmoid scores multiply the experts' inputs, and only the block sums over picks."""

    @property
    def output_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def scales_inputs(self) -> bool:
        return True

    def read(self) -> Experts:
        experts = self.container
        gate, up = experts.gate_up_proj.detach().mT.chunk(2, dim=1)
        tensors = {"gate": gate, "up": up, "down": experts.down_proj.detach().mT}
        return Experts(tensors, lambda gate, up: experts.act_fn(gate) * up)

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        return _on_llama4_router(self, sink)


class MergedLlama4Layer(FusedLayer):
    """Merged experts of Llama 4, whose inputs are scaled as those of the original."""

    @property
    def output_name(self) -> str:
        return self.name.rpartition(".")[0]

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        return _on_llama4_router(self, sink)


def _on_llama4_router(layer: MoELayer, sink: Sink) -> list[RemovableHandle]:
    def on_router(module: Any, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, logits = output
        index = logits.topk(module.top_k, dim=1).indices  # [T, K]
        scale = scores.gather(1, index)
        layer.hand_over(sink, logits, arguments[0], layer.stored(index), torch.ones_like(scale), scale)

    return [layer.router.register_forward_hook(on_router)]


class JetMoeLayer(MoELayer):
    """JetMoE's feed-forward experts; the container is the whole block. Its attention experts stay."""

    def read(self) -> Experts:
        block = self.container
        gate, up = block.input_linear.weight.detach().chunk(2, dim=1)
        tensors = {"gate": gate, "up": up, "down": block.output_linear.weight.detach()}
        return Experts(tensors, lambda gate, up: block.activation(gate) * up)

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{name}.weight", getattr(self.container, name).weight) for name in ("input_linear", "output_linear")]

    @property
    def router(self) -> Any:
        return self.container.router

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        def on_router(module: Any, arguments: tuple, output: tuple) -> None:
            values, index = output[-1].topk(module.top_k, dim=1)
            self.hand_over(sink, output[-1], arguments[0], index, values.softmax(1).type_as(arguments[0]))

        return [self.router.register_forward_hook(on_router)]


class DbrxLayer(FusedLayer):
    """DBRX: the rows of all experts in one matrix; the down matrix is stored transposed."""

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.container.named_parameters())

    def read(self) -> Experts:
        mlp = self.container.mlp
        shape = (self.num_experts, self.intermediate_size, self.hidden_size)
        gate, up, down = (tensor.detach().view(shape) for tensor in (mlp.w1, mlp.v1, mlp.w2))
        tensors = {"gate": gate, "up": up, "down": down.mT}
        return Experts(tensors, lambda gate, up: mlp.activation_fn(gate) * up)


class SwitchLayer(MoELayer):
    """Top-1 experts `wi`, `wo` without gate; tokens over an expert's capacity reach none."""

    def read(self) -> Experts:
        experts = [self.container[f"expert_{index}"] for index in range(self.num_experts)]
        up = [expert.wi.weight.detach() for expert in experts]
        tensors = {"up": up, "down": [expert.wo.weight.detach() for expert in experts]}
        return Experts(tensors, lambda gate, up: experts[0].act(up))

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        return _on_switch_router(self, sink)


class MergedSwitchLayer(FusedLayer):
    """Merged experts of Switch, behind the original's router."""

    def routed(self, sink: Sink) -> list[RemovableHandle]:
        return _on_switch_router(self, sink)


def _on_switch_router(layer: MoELayer, sink: Sink) -> list[RemovableHandle]:
    def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
        dispatch, weights, logits = (tensor.reshape(-1, tensor.shape[-1]) for tensor in output)
        over = ~dispatch.any(-1, keepdim=True)  # the expert's capacity
        index = dispatch.argmax(-1, keepdim=True).masked_fill(over, layer.num_routed)
        layer.hand_over(sink, logits, arguments[0], layer.stored(index), weights.masked_fill(over, 0))

    return [layer.router.register_forward_hook(on_router)]
