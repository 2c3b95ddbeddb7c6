"""Gradients of the loss with respect to the experts, for statistics that read them."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.layers.batches import Batch, forward
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.labels import labelled
from hf_mcsmoe.methods.statistics import gradient_names


@contextlib.contextmanager
def gradients_of_experts(layers: Layers) -> Iterator[None]:
    """Let the experts' parameters, and no others, take gradients for the time of the block, then be as they were.

    Raises:
        ValueError: weights that are offloaded, to which no gradient comes.
    """
    experts = {id(parameter) for layer in layers for _, parameter in layer.parameters}
    is_folder = isinstance(layers.source, Folder)
    if not is_folder and any(parameter.is_meta for layer in layers for _, parameter in layer.parameters):
        raise ValueError(
            "A statistic by gradients needs the experts in memory, and these are offloaded: load the model onto one "
            "device, read it block by block (--stream; a Folder), or choose methods without gradients."
        )
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in layers.model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in experts)
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def check_loss(model: PreTrainedModel, needs: Iterable[str]) -> None:
    """Raise ValueError where statistics read gradients of a loss, and models of this class have none."""
    late = gradient_names(needs)
    if late and "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{late[0]} reads gradients of a loss, and a {type(model).__name__} has none: load the model with its "
            "head, or choose methods without gradients."
        )


def loss_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the model's loss on a batch: with its `labels`, or else of predicting each next token that is no padding.

    Raises:
        ValueError: the model gives none.
    """
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    next_token = labelled(model) == "text" and not model.config.is_encoder_decoder
    if takes_labels and batch.get("labels") is None and next_token and "input_ids" in batch:
        labels = batch["input_ids"]
        if (mask := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, -100)
        batch = {**batch, "labels": labels}
    loss = forward(model, batch).get("loss")
    if loss is None or not loss.requires_grad:
        raise ValueError(
            f"{type(model).__name__} gave no loss for a batch of {', '.join(batch)}, but a statistic reads its "
            "gradient: pass batches with labels to a model with a loss, or choose methods without gradients."
        )
    return loss
