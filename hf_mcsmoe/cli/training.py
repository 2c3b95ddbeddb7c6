"""What `distill` adds to a Trainer: the options of a training, its progress, and the checkpoints of a killed run."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mcsmoe.cli.display import notes, passing
from hf_mcsmoe.cli.options import LAST_SEED, described
from hf_mcsmoe.data.tasks import Task
from hf_mcsmoe.distillation.checkpoints import last_checkpoint
from hf_mcsmoe.files import read_json, write_json
from hf_mcsmoe.modeling.folders_mcsmoe import work_place

EPOCHS, LEARNING_RATE, BATCH_SIZE, WARMUP_STEPS = 3.0, 5e-5, 8, 16
# Losses are logged so often in a run.
LOGS = 50
OPTIONS = "options.json"
# What a run may change when it goes on.
FREE = ("learning_rate",)


@dataclass(frozen=True)
class Training:
    """How long and how fast to train; where nothing is given, the paper's settings for the task."""

    epochs: float | None = described(None, f"passes over the data, {EPOCHS:g} unless --max-steps is given")
    max_steps: int | None = described(None, "optimiser steps, instead of --epochs", min=1)
    learning_rate: float | None = described(
        None, f"highest learning rate; by default the paper's for the task, else {LEARNING_RATE:g}"
    )
    batch_size: int | None = described(
        None, f"rows in a forward; by default the paper's for the task, else {BATCH_SIZE}", min=1
    )
    gradient_accumulation_steps: int = described(1, "forwards per optimiser step", min=1)
    warmup_steps: int | None = described(
        None, f"steps until the highest learning rate; by default {WARMUP_STEPS} (paper), or a tenth of all if fewer"
    )
    seed: int = described(0, "seed of the order of the rows, of dropout and of masked spans", min=0, max=LAST_SEED)
    bf16: bool = described(False, "compute in bfloat16 (weights stay as --dtype says)")
    save_steps: int = described(500, "steps between two checkpoints, from which --resume goes on", min=1)

    def arguments(self, task: Task | None, rows: int, folder: Path) -> dict[str, Any]:
        """Return these settings as arguments of a Trainer that keeps its checkpoints in `folder`.

        Raises:
            ValueError: both lengths are given.
        """
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("--epochs and --max-steps both say how long to train: give one.")
        batch_size = self.batch_size or (task.batch_size if task else BATCH_SIZE)
        batches = math.ceil(rows / batch_size)
        epochs = EPOCHS if self.epochs is None else self.epochs
        steps = self.max_steps or math.ceil(epochs * math.ceil(batches / self.gradient_accumulation_steps))
        if steps < 1:
            raise ValueError(f"--epochs {self.epochs} is no training; it must be more than 0.")
        rate = (task.learning_rate if task else LEARNING_RATE) if self.learning_rate is None else self.learning_rate
        if not 0 < rate < math.inf:
            raise ValueError(f"--learning-rate {rate} trains nothing; it must be more than 0, and finite.")
        warmup = min(WARMUP_STEPS, steps // 10) if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps:
            raise ValueError(f"--warmup-steps {warmup} take all of the {steps} steps of the training: lower them.")
        return {
            "output_dir": str(folder),
            "max_steps": steps,
            "learning_rate": rate,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "warmup_steps": warmup,
            "seed": self.seed,
            "bf16": self.bf16,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "logging_steps": max(1, steps // LOGS),
            "logging_first_step": True,
            "use_cpu": not torch.accelerator.is_available(),
            "report_to": "none",
            "disable_tqdm": True,
        }


class TrainingProgress(TrainerCallback):
    """Shows how far a Trainer is, with the terms of its loss: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        columns = (TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.console = console
        self.progress = passing(*columns, TextColumn("{task.fields[terms]}"), shown_on=console)
        self.task = self.progress.add_task("distil", total=None, terms="", visible=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start where a resumed run goes on."""
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps, visible=True)
        if self.console.is_terminal:
            self.progress.start()

    def stop(self) -> None:
        """Let what is shown vanish."""
        if self.console.is_terminal:
            self.progress.stop()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the terms of the loss and the share of rows of S that are kept."""
        terms = {name: value for name, value in (logs or {}).items() if name.endswith("_loss") or name == "kept_share"}
        terms.pop("train_loss", None)  # the Trainer's own mean over all, at the end
        if not terms:
            return
        text = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.progress.update(self.task, terms=text)
        if not self.console.is_terminal:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False, soft_wrap=True)


@contextmanager
def training_progress(shown_on: Console = notes) -> Iterator[TrainingProgress]:
    """Yield a callback for a Trainer; what it shows ends with the block, whatever happens in there."""
    shown = TrainingProgress(shown_on)
    try:
        yield shown
    finally:
        shown.stop()


def training_folder(output: Path) -> Path:
    """Return the folder in which a run keeps its checkpoints until it is complete."""
    return work_place(Path(os.path.realpath(output))) / "training"


def check_working_folder(folder: Path, options: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Return the checkpoint to resume from, if there is one and it is asked for.

    Raises:
        ValueError: a killed run's checkpoints would be lost, it had other options, or all of its checkpoints are
            damaged.
    """
    found = last_checkpoint(folder, thorough=resume)
    if not resume:
        if (found.path or found.damaged) and not overwrite:
            raise ValueError(
                f"{found.path or folder} is what a killed run left: go on from there with --resume, or lose it with "
                "--overwrite."
            )
        return None
    if found.path is None and found.damaged:
        raise ValueError(f"{' '.join(found.skipped)} Start anew, with --overwrite and without --resume.")
    for sentence in found.skipped:
        notes.print(escape(sentence), highlight=False, soft_wrap=True)
    checkpoint = found.path
    if checkpoint is None:
        return None
    before = read_json(folder / OPTIONS, "begin anew, with --overwrite instead of --resume")
    changed = [name for name in options if name not in FREE and before.get(name) != options[name]]
    if changed:
        what = ", ".join(f"{name}: {before.get(name)!r} before, {options[name]!r} now" for name in changed)
        raise ValueError(
            f"The run in {folder} had other options ({what}): resume with the same ones; only the learning rate may "
            "be another."
        )
    return checkpoint


@contextmanager
def kept_until_complete(folder: Path, options: Mapping[str, Any], checkpoint: Path | None) -> Iterator[None]:
    """Keep checkpoints in `folder` for the time of the block, and remove them once it is done without an error.

    Args:
        options: what the run is asked to do, for a resumed one to be compared with.
        checkpoint: where it goes on; None where it begins anew.
    """
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / OPTIONS, dict(options))
    try:
        yield
    except BaseException:
        left = last_checkpoint(folder, thorough=False)
        if left.path is None and not left.damaged:
            shutil.rmtree(folder)
        elif left.path is not None:
            notes.print(f"{escape(str(left.path))} is kept: --resume goes on from there.")
        raise
    shutil.rmtree(folder)
