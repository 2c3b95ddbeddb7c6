"""Switch Transformers: a dictionary of small dense layers, dispatched by a one-hot mask with a capacity."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_mcsmoe.adapters.base import MoELayer, Observer, Sink
from hf_mcsmoe.experts import ExpertWeights


class SwitchLayer(MoELayer):
    """Top-1 experts `wi`, `wo` without gate; tokens over an expert's capacity reach none."""

    def read(self) -> ExpertWeights:
        experts = [self.container[f"expert_{index}"] for index in range(self.num_experts)]
        up = [expert.wi.weight.detach() for expert in experts]
        return ExpertWeights({"up": up, "down": [expert.wo.weight.detach() for expert in experts]})

    def observe(self, observer: Observer) -> list[RemovableHandle]:
        def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
            index, weights = _picks(output)
            # No pick at all, which counts nowhere; a pick of weight 0 elsewhere is a token that was routed.
            observer(output[-1].reshape(-1, output[-1].shape[-1]), index.masked_fill(weights == 0, -1), weights)

        return [self.router.register_forward_hook(on_router)]

    def record(self, sink: Sink) -> list[RemovableHandle]:
        def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
            sink(arguments[0].reshape(-1, arguments[0].shape[-1]), *_picks(output))

        return [self.router.register_forward_hook(on_router)]


def _picks(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a router's picks int [T, 1] and their weights [T, 1], zero for tokens over capacity."""
    dispatch, probability = (tensor.reshape(-1, tensor.shape[-1]) for tensor in output[:2])
    return dispatch.argmax(-1, keepdim=True), probability * dispatch.any(-1, keepdim=True)
