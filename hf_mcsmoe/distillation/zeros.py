"""Weights inside experts that were left out stay zero while a model is trained."""

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from hf_mcsmoe.attached import record_of
from hf_mcsmoe.distillation.trainable import student_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.record import SPARSITY


def has_zeros(model: PreTrainedModel) -> bool:
    """Tell whether single weights inside the experts of a model were left out, as its record says, if it has one."""
    if "base_model_type" not in model.config.to_dict():
        return False
    steps = [step for step in record_of(model).steps if step.title == SPARSITY]
    return any(step.options.get("pattern") != "units" for step in steps)


class KeepZeros(TrainerCallback):
    """Sets the weights inside experts that are zero when training begins to zero again after every step."""

    zeros: list[tuple[torch.nn.Parameter, torch.Tensor]]

    def on_train_begin(self, *arguments: Any, model: Any = None, **others: Any) -> None:
        """Note which weights are zero, also where a checkpoint was loaded meanwhile."""
        layers = Layers.of(student_of(model))
        parameters = {id(value): value for layer in layers for name, value in layer.parameters if "bias" not in name}
        self.zeros = [(value, value.detach() == 0) for value in parameters.values() if value.requires_grad]

    @torch.no_grad()
    def on_optimizer_step(self, *arguments: Any, **others: Any) -> None:
        """Set them to zero again."""
        for parameter, zeros in self.zeros:
            parameter.masked_fill_(zeros, 0)
