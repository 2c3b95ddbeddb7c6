"""Switch Transformers: a dictionary of small dense layers, dispatched by a one-hot mask with a capacity."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_mcsmoe.adapters.base import MoELayer, Observer
from hf_mcsmoe.experts import ExpertWeights


class SwitchLayer(MoELayer):
    """Top-1 experts `wi`, `wo` without gate; tokens over an expert's capacity reach none."""

    def read(self) -> ExpertWeights:
        experts = [self.container[f"expert_{index}"] for index in range(self.num_experts)]
        up = [expert.wi.weight.detach() for expert in experts]
        return ExpertWeights({"up": up, "down": [expert.wo.weight.detach() for expert in experts]})

    def observe(self, observer: Observer) -> list[RemovableHandle]:
        def on_router(module: nn.Module, arguments: tuple, output: tuple[torch.Tensor, ...]) -> None:
            dispatch, probability, logits = (tensor.reshape(-1, tensor.shape[-1]) for tensor in output)
            dropped = ~dispatch.any(-1, keepdim=True)
            index = dispatch.argmax(-1, keepdim=True).masked_fill(dropped, -1)
            observer(logits, index, probability.masked_fill(dropped, 0))

        return [self.router.register_forward_hook(on_router)]
