"""A Trainer of compressed models: saves what loads, resumes only what fits, and stops before weights become NaN."""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from hf_mcsmoe.distillation.checkpoints import (
    check_checkpoint,
    check_pruning,
    is_checkpoint,
    last_checkpoint,
    written_last,
)
from hf_mcsmoe.distillation.trainable import merged_state, student_of
from hf_mcsmoe.modeling.saving_mcsmoe import DOCUMENTS


class CompressedModelTrainer(Trainer):
    """A `Trainer` whose saved models are compressed checkpoints, with or without adapters (LoRA) in training.

    With adapters, a checkpoint holds them alone, to resume from; `save_model` merges them into the weights.
    """

    args: Any
    model: Any

    @property
    def student(self) -> PreTrainedModel:
        """The compressed model, free of what wraps it for training."""
        return student_of(self.accelerator.unwrap_model(self.model))

    @property
    def is_compressed(self) -> bool:
        """Whether the model is compressed, and so brings a card of its own."""
        return bool(getattr(self.student.config, "mcsmoe", None))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a run that resumes goes on at the learning rate of its own arguments.

        Raises:
            ValueError: a checkpoint that is none, of another model, or of a run that prunes what this one would not.
            RuntimeError: the loss, a gradient or a weight is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): none was written to its "
                    "end, so start without resume_from_checkpoint."
                )
        if isinstance(resume_from_checkpoint, str | Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
            check_checkpoint(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))
            check_pruning(Path(resume_from_checkpoint), self.callback_handler.callbacks)
            self.args.resume_from_checkpoint = resume_from_checkpoint  # for callbacks, which are not told
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step.

        Raises:
            RuntimeError: the loss is not finite; the message names the last checkpoint.
        """
        loss = super().training_step(model, *args, **kwargs)
        self._check_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm after making sure, before the optimiser's step, that it is finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # which leaves out such steps itself
            self._check_finite("norm of the gradient", torch.as_tensor(norm))
        return norm

    def _check_finite(self, what: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            self._stop(f"The {what} is {float(value)}")

    def _stop(self, what: str) -> NoReturn:
        last = self._last_checkpoint()
        start = f"resume from the last checkpoint, {last}," if last else "no checkpoint was saved yet: start again"
        raise RuntimeError(
            f"{what} at step {self.state.global_step}; {start} with a lower learning rate, or in float32 or bfloat16 "
            "instead of float16."
        )

    def _last_checkpoint(self) -> Path | None:
        return last_checkpoint(Path(self.args.output_dir), written_last(self.callback_handler.callbacks))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take up the optimizer and the schedule of a checkpoint, but not its learning rate, as a Trainer would."""
        schedule: Any = self.lr_scheduler
        rates = list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if rates is None or rates == schedule.base_lrs:
            return
        schedule.base_lrs = rates
        for group, rate, share in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * share(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint after making sure that its weights are finite, so that the last is one to resume from."""
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
            self._stop("A weight is no longer finite")
        super()._save_checkpoint(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave a compressed model its own card, which saving it has written; others get the Trainer's."""
        if not self.is_compressed:
            super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model: with adapters, those alone in a checkpoint, elsewhere the weights with them merged in."""
        folder, adapted = Path(output_dir or self.args.output_dir), self.model
        if not isinstance(adapted, PeftModel):
            super()._save(output_dir, state_dict)
        elif is_checkpoint(folder):
            super()._save(output_dir, state_dict)
            if self.args.should_save:  # what `check_checkpoint` reads
                self.student.config.save_pretrained(folder)
        else:
            self.model = student_of(adapted)
            try:
                super()._save(output_dir, merged_state(adapted))
            finally:
                self.model = adapted

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint together with the code, the plan and the card; adapters wait for the end of training."""
        if isinstance(self.model, PeftModel):
            return
        if self.is_world_process_zero():
            for file in Path(checkpoint_folder).iterdir():
                if file.suffix == ".py" or file.name in DOCUMENTS:
                    shutil.copyfile(file, Path(self.args.output_dir) / file.name)
        super()._push_from_checkpoint(checkpoint_folder)
