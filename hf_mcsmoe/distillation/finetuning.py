"""Fine-tuning before a merge: cross-entropy over the labels, and the routers' own losses."""

from typing import Any

import torch
from transformers import Seq2SeqTrainer

from hf_mcsmoe.distillation.losses import cross_entropy
from hf_mcsmoe.distillation.resumable_trainer import ResumableTrainer
from hf_mcsmoe.layers.batches import without_cache

# The routers' losses in a model's outputs, on each of its sides, and where its configuration weighs them.
ROUTER_LOSSES = {"z_loss": "router_z_loss_coef", "aux_loss": "router_aux_loss_coef"}


class FinetuneTrainer(ResumableTrainer, Seq2SeqTrainer):
    """A Trainer whose loss is a mean over the labels of the accumulated batch of all processes, plus the routers' own.

    Switch's loss is a mean over the labels of one process's part of the batch, which the Trainer takes for this one
    and scales up by the number of processes and of accumulation steps (Transformers 5.24); and it adds the losses of
    the routers only where a forward asks for them.
    """

    model: Any

    def __init__(self, *args: Any, router_losses: bool, **kwargs: Any) -> None:
        """Take the arguments of the Trainer; routers' losses count where the model has them."""
        super().__init__(*args, **{"compute_loss_func": self.mean_loss, **kwargs})
        self.coefficients = {name: self.model.config.to_dict().get(key) for name, key in ROUTER_LOSSES.items()}
        self.router_losses = router_losses and None not in self.coefficients.values()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, with that of the routers in training."""
        more: dict[str, Any] = without_cache(self.model)
        more |= {"output_router_logits": True} if self.router_losses and model.training else {}
        return super().compute_loss(model, {**inputs, **more}, *args, **kwargs)

    def mean_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss of a part of the accumulated batch."""
        total = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy(outputs.logits, labels, self.args.label_smoothing_factor) / total
        if not (self.router_losses and self.model.training):
            return loss
        parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            parts *= self.accelerator.num_processes
        routers = sum(
            weight * outputs[f"{side}_{name}"]
            for name, weight in self.coefficients.items()
            for side in ("encoder", "decoder")
        )
        return loss + routers / parts
