"""The families outside the experts interface: Switch, Llama 4, JetMoE, DBRX, and those refused."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_mcsmoe.layers.fused import FusedLayer
from hf_mcsmoe.layers.layer import MoELayer, Observer, Sink, record_logits
from hf_mcsmoe.methods.experts import ExpertWeights

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
    """Llama 4: transposed, gated; sigmoid scores multiply the experts' inputs.

    So `record` has a row for each pick of a token, scaled, with weight 1, and only the block sums over the picks.
    """

    @property
    def output_name(self) -> str:
        return self.name.rpartition(".")[0]

    def read(self) -> ExpertWeights:
        gate, up = self.container.gate_up_proj.detach().mT.chunk(2, dim=1)
        return ExpertWeights({"gate": gate, "up": up, "down": self.container.down_proj.detach().mT})

    def observe(self, observer: Observer) -> list[RemovableHandle]:
        def picked(logits: torch.Tensor) -> None:
            values, index = logits.topk(self.router.top_k, dim=1)
            observer(logits, index, values.float().sigmoid())

        return record_logits(self, picked)

    def record(self, sink: Sink) -> list[RemovableHandle]:
        def on_router(module: Any, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            scores, logits = output
            index = logits.topk(module.top_k, dim=1).indices  # [T, K]
            scaled = arguments[0][:, None, :] * scores.gather(1, index)[:, :, None]  # [T, K, D]
            sink(scaled.flatten(0, 1), index.reshape(-1, 1), scaled.new_ones(index.numel(), 1))

        return [self.router.register_forward_hook(on_router)]


class JetMoeLayer(MoELayer):
    """JetMoE's feed-forward experts; the container is the whole block. Its attention experts stay."""

    def read(self) -> ExpertWeights:
        gate, up = self.container.input_linear.weight.detach().chunk(2, dim=1)
        return ExpertWeights({"gate": gate, "up": up, "down": self.container.output_linear.weight.detach()})

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{name}.weight", getattr(self.container, name).weight) for name in ("input_linear", "output_linear")]

    @property
    def router(self) -> Any:
        return self.container.router

    def observe(self, observer: Observer) -> list[RemovableHandle]:
        def on_router(module: Any, arguments: tuple, output: tuple) -> None:
            observer(output[-1], *_picks(module, output))

        return [self.router.register_forward_hook(on_router)]

    def record(self, sink: Sink) -> list[RemovableHandle]:
        def on_router(module: Any, arguments: tuple, output: tuple) -> None:
            index, weights = _picks(module, output)
            sink(arguments[0], index, weights.type_as(arguments[0]))

        return [self.router.register_forward_hook(on_router)]


def _picks(router: Any, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Return JetMoE's picks int [T, K] and their weights [T, K]."""
    values, index = output[-1].topk(router.top_k, dim=1)
    return index, values.softmax(1)


class DbrxLayer(FusedLayer):
    """DBRX: the rows of all experts in one matrix; the down matrix is stored transposed."""

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.container.named_parameters())

    def read(self) -> ExpertWeights:
        mlp = self.container.mlp
        shape = (self.num_experts, self.intermediate_size, self.hidden_size)
        gate, up, down = (tensor.detach().view(shape) for tensor in (mlp.w1, mlp.v1, mlp.w2))
        return ExpertWeights({"gate": gate, "up": up, "down": down.mT})


class SwitchLayer(MoELayer):
    """Top-1 experts `wi`, `wo` without gate; tokens over an expert's capacity reach none."""

    def read(self) -> ExpertWeights:
        experts = [self.container[f"expert_{index}"] for index in range(self.num_experts)]
        up = [expert.wi.weight.detach() for expert in experts]
        return ExpertWeights({"up": up, "down": [expert.wo.weight.detach() for expert in experts]})

    def observe(self, observer: Observer) -> list[RemovableHandle]:
        def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
            index, weights = _switch_picks(output)
            # No pick at all, which counts nowhere; a pick of weight 0 elsewhere is a token that was routed.
            observer(output[-1].reshape(-1, output[-1].shape[-1]), index.masked_fill(weights == 0, -1), weights)

        return [self.router.register_forward_hook(on_router)]

    def record(self, sink: Sink) -> list[RemovableHandle]:
        def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
            sink(arguments[0].reshape(-1, arguments[0].shape[-1]), *_switch_picks(output))

        return [self.router.register_forward_hook(on_router)]


def _switch_picks(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a router's picks int [T, 1] and their weights [T, 1], zero for tokens over capacity."""
    dispatch, probability = (tensor.reshape(-1, tensor.shape[-1]) for tensor in output[:2])
    return dispatch.argmax(-1, keepdim=True), probability * dispatch.any(-1, keepdim=True)
