"""A Trainer that goes on from whole checkpoints of its own run alone, and so ends as if it had never stopped."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_mcsmoe.distillation.checkpoints import Found, check_run, last_checkpoint, resumable_flaw
from hf_mcsmoe.distillation.fingerprints import sample_fingerprint
from hf_mcsmoe.distillation.seal import SEAL, flaw, seal
from hf_mcsmoe.distillation.trainable import student_of

# Arguments that decide which rows a step sees: a run that goes on with others has not seen what it has counted.
ORDER = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("dataloader_drop_last", "train_sampling_strategy"),
)
# Other arguments of a Trainer that decide on the result; those that a subclass adds do so too.
DECISIVE = (
    *("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "average_tokens_across_devices"),
)


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are sealed when all of their files are written, and resumed only where they are.

    An older checkpoint is deleted (`save_total_limit`) once the new one is whole.
    """

    args: Any
    # Names of the arguments that decide on the result.
    decisive: tuple[str, ...] = DECISIVE
    _unsealed: Path | None = None
    _callbacks_follow = False
    _run: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with True, go on from the last whole checkpoint in `output_dir`, and warn of those left out.

        Raises:
            ValueError: no checkpoint, one with files that are missing or damaged, or one of another run.
        """
        self._run = None
        folder = self._to_resume(resume_from_checkpoint)
        if folder is not None:
            self.check_resumed(folder)
            self.args.resume_from_checkpoint = str(folder)  # for callbacks, which are not told
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    def _to_resume(self, asked: str | Path | bool | None) -> Path | None:
        if asked is None or asked is False:
            return None
        # The first process reads the files, which takes a while, for all of them.
        first, answer = self.is_world_process_zero(), [Found(), ""]
        if first and asked is True:
            answer[0] = last_checkpoint(Path(self.args.output_dir))
        elif first:
            answer[1] = resumable_flaw(Path(str(asked)))
        found, problem = cast(tuple[Found, str], tuple(broadcast_object_list(answer)))
        if problem:
            raise ValueError(problem)
        if asked is not True:
            return Path(str(asked))
        if found.path is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({self.args.output_dir}): "
                f"{' '.join(found.skipped) or 'there is none.'} Start without resume_from_checkpoint."
            )
        for sentence in found.skipped:
            warnings.warn(sentence, stacklevel=4)
        return found.path

    def check_resumed(self, folder: Path) -> None:
        """Check that a whole checkpoint is of this run; other arguments that leave its rows are warned of.

        Raises:
            ValueError: it is not.
        """
        run = self._described_run()
        check_run(folder, run["identity"], run["arguments"])

    def run_identity(self) -> dict[str, Any]:
        """Return what makes another run where it differs: the rows, and what decides on their order."""
        data = sample_fingerprint(self.train_dataset, student_of(self.accelerator.unwrap_model(self.model)))
        given = {**self.args.to_dict(), "world_size": self.args.world_size}
        return {"data": data, **{name: given[name] for name in ORDER}}

    def _described_run(self) -> dict[str, Any]:
        """Return what the seal tells of the run, as JSON values; found out once."""
        if self._run is None:
            given = self.args.to_dict()
            run = {"identity": self.run_identity(), "arguments": {name: given[name] for name in self.decisive}}
            self._run = json.loads(json.dumps(run, default=str))
        return self._run

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._callbacks_follow = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._callbacks_follow = False
        self._seal()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, which is sealed when the callbacks have written to it as well."""
        run_dir, limit = self._get_output_dir(trial), self.args.save_total_limit
        self._unsealed = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (self._unsealed / SEAL).unlink(missing_ok=True)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self._callbacks_follow:  # as of a checkpoint that a signal asks for
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._seal()

    def _seal(self) -> None:
        """Seal the checkpoint that was written, if there is one, and delete those that are too many."""
        folder, self._unsealed = self._unsealed, None
        if folder is None:
            return
        run = self._described_run()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the limit that they have
            seal(folder, run, resumable=not self.args.save_only_model)
            rotate_checkpoints(
                str(folder.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _load_best_model(self) -> None:
        """Load the best checkpoint; where it is no longer whole, the last weights stay, and a warning says so."""
        best = Path(str(self.state.best_model_checkpoint))
        if reason := flaw(best, resumed=False):
            warnings.warn(f"The best checkpoint {best} is not loaded: {reason}. The last weights stay.", stacklevel=4)
            return
        super()._load_best_model()
