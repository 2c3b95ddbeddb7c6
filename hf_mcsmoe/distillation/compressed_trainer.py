"""A Trainer of compressed models: saves what loads, resumes only what fits, and stops before weights become NaN."""

import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hf_mcsmoe.distillation.checkpoints import check_checkpoint, check_pruning, is_checkpoint, last_checkpoint
from hf_mcsmoe.distillation.expert_pruning import ExpertPruningCallback
from hf_mcsmoe.distillation.fingerprints import weights_fingerprint
from hf_mcsmoe.distillation.resumable_trainer import ResumableTrainer
from hf_mcsmoe.distillation.trainable import merged_state, student_of
from hf_mcsmoe.modeling.auto import compression


class CompressedModelTrainer(ResumableTrainer):
    """A `Trainer` whose saved models are compressed checkpoints, with or without adapters (LoRA) in training.

    With adapters, a checkpoint holds them alone, to resume from; `save_model` merges them into the weights.
    """

    args: Any
    model: Any
    # The checkpoint that is still to be pushed.
    _unpushed: Path | None = None
    hub_model_id: Any
    push_in_progress: Any

    @property
    def student(self) -> PreTrainedModel:
        """The compressed model, free of what wraps it for training."""
        return student_of(self.accelerator.unwrap_model(self.model))

    @property
    def is_compressed(self) -> bool:
        """Whether the model is compressed, and so brings a card of its own."""
        return bool(compression(self.student))

    def check_resumed(self, folder: Path) -> None:
        """Check a whole checkpoint against the model, the callbacks and the run.

        Raises:
            ValueError: it is of another model, another run, or one that prunes what this one would not.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExpertPruningCallback):
                callback.take_up(folder, self.student)
        check_checkpoint(folder, self.accelerator.unwrap_model(self.model))
        check_pruning(folder, self.callback_handler.callbacks)
        super().check_resumed(folder)

    def run_identity(self) -> dict[str, Any]:
        """Return what makes another run where it differs: of adapters, the weights that they lie beside as well."""
        identity = super().run_identity()
        if isinstance(self.model, PeftModel):
            weights = self.model.named_parameters()
            frozen = ((name, value) for name, value in weights if not value.requires_grad)
            identity["frozen weights"] = weights_fingerprint(frozen)
        return identity

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
        last = last_checkpoint(Path(self.args.output_dir), thorough=False).path
        start = f"resume from the last checkpoint, {last}," if last else "no checkpoint was saved yet: start again"
        raise RuntimeError(
            f"{what} at step {self.state.global_step}; {start} with a lower learning rate, or in float32 or bfloat16 "
            "instead of float16."
        )

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
        """Let the push wait until callbacks have written to the checkpoint as well."""
        self._unpushed = Path(checkpoint_folder)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        folder, self._unpushed = self._unpushed, None
        if folder is not None and self.args.hub_strategy != HubStrategy.END and not self._push_goes_on():
            self._push(folder)

    def _push(self, folder: Path) -> None:
        """Push what `save_model` writes; a Trainer would push the weights of the checkpoint as they are in training.

        With a `hub_strategy` of "checkpoint" or "all_checkpoints" the folder to resume from goes beside it.
        """
        args, message = self.args, f"Training in progress, step {self.state.global_step}"
        self._finish_current_push()
        with warnings.catch_warnings():
            if self.state.global_step < self.state.max_steps:  # the rows that are too many are yet to be chosen
                warnings.filterwarnings("ignore", ".*pruned by magnitude")
            jobs: Any = [self.push_to_hub(message, blocking=False)]
        if not self.is_world_process_zero():
            return
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        if args.hub_strategy in places:
            jobs.append(
                HfApi(token=args.hub_token).upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=folder,
                    path_in_repo=places[args.hub_strategy],
                    commit_message=f"{message}, checkpoint",
                    revision=args.hub_revision,
                    run_as_future=True,
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    def _push_goes_on(self) -> bool:
        """Return, in all processes alike, whether this push is left out since an earlier one is not done.

        The last one is not: it is what stays on the Hub.
        """
        answer = [False]
        if self.is_world_process_zero() and not self.args.hub_always_push:
            done = self.push_in_progress is None or self.push_in_progress.is_done()
            answer = [not done and self.state.global_step < self.state.max_steps]
        return broadcast_object_list(answer)[0]
