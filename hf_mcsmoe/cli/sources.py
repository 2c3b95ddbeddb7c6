"""Where commands take rows from: calibration text, a task, or text of the user's own."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.cli.options import described
from hf_mcsmoe.data.features import (
    Feature,
    calibration_features,
    feature_batches,
    split_held_out,
    task_features,
    text_features,
)
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.data.tasks import TASKS, Task, get_task, task_rows
from hf_mcsmoe.data.text import Sample, read_samples
from hf_mcsmoe.record import is_repo_id, public_name

TEXT_LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """The text that a model is compressed on."""

    data: str = described(MISSING, "calibration text: a file (txt, json, jsonl, csv, parquet) or a data set")
    column: str | None = described(None, "column of the data with the text")
    target_column: str | None = described(None, "column with the target, for encoder-decoders")
    split: str = described("train", "split of a data set")
    num_samples: int = described(256, "calibration samples, an eighth of them held out to judge the result", min=1)
    max_length: int = described(512, "longest sample, in tokens", min=2)
    batch_size: int = described(8, "samples per forward", min=1)
    seed: int = described(0, "seed of the samples drawn and of random methods")

    def read(self) -> list[Sample]:
        """Return the samples.

        Raises:
            ValueError: there is no such data, or no such column.
        """
        return read_samples(self.data, column=self.column, target_column=self.target_column, split=self.split)

    @property
    def names(self) -> list[str]:
        """What others may know the data by: a Hub id, or the last part of a path."""
        return [self.data if is_repo_id(self.data.partition(":")[0]) else public_name(self.data)]

    def batches(
        self, samples: list[Sample], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        """Return some of the samples as batches for `model(**batch)`: those to fit to, and those held out."""
        lengths: dict[str, Any] = {"num_samples": self.num_samples, "max_length": self.max_length, "seed": self.seed}
        parts = split_held_out(calibration_features(samples, tokenizer, model, **lengths))
        fitted, held_out = (feature_batches(part, tokenizer, self.batch_size, by_length=False) for part in parts)
        return fitted, held_out


@dataclass(frozen=True)
class Source:
    """Where rows come from, as a user names it."""

    task: str | None = described(None, f"a task: {', '.join(TASKS)}")
    data: str | None = described(
        None, "text instead of a task: a file (txt, json, jsonl, csv, parquet) or a data set (a folder or Hub id)"
    )
    data_dir: Path | None = described(
        None, "folder with the task's rows, laid out like the Hub: <organisation>/<name>; by default the Hub itself"
    )
    file: Path | None = described(None, "file with the task's rows, in JSON Lines")
    split: str | None = described(None, "split of the data set, if not the usual one")
    limit: int | None = described(None, "only so many rows, the first", min=1)
    column: str | None = described(None, "column of --data with the text")
    target_column: str | None = described(None, "column of --data with the target")
    max_length: int | None = described(
        None,
        "longest source or text, in tokens; by default the task's, or 512",
        names=("--max-length", "--max-source-length"),
        min=2,
    )
    fixed_spans: bool = described(
        False,
        "mask spans of equal length where an encoder-decoder gets text without targets",
        names=("--fixed-spans",),
    )

    def read(self, *, training: bool) -> "Contents":
        """Return the rows, those to train on or those to evaluate on unless a split is named.

        Raises:
            ValueError: neither or both of a task and text, options of the other kind, no such task, file or split, or
                rows that do not fit the task.
        """
        if (self.task is None) == (self.data is None):
            raise ValueError("Name what to read: either --task or --data.")
        of_tasks = {"--data-dir": self.data_dir, "--file": self.file}
        of_texts = {"--column": self.column, "--target-column": self.target_column}
        other, options = ("--task", of_tasks) if self.task is None else ("--data", of_texts)
        stray = [name for name, value in options.items() if value is not None]
        if stray:
            raise ValueError(f"{stray[0]} goes with {other}, which is not given.")
        if self.task is None:
            split = self.split or ("train" if training else "validation")
            samples = read_samples(str(self.data), column=self.column, target_column=self.target_column, split=split)
            return Contents(None, [], samples[: self.limit], self.max_length, self.fixed_spans)
        return self._read_task(get_task(self.task), training)

    def _read_task(self, task: Task, training: bool) -> "Contents":
        if self.file is not None and (self.split or self.data_dir):
            raise ValueError(f"--file {self.file} is all that is read: leave out --data-dir and --split.")
        if self.file is not None and not self.file.is_file():
            raise ValueError(f"There is no file {self.file}.")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise ValueError(f"There is no folder {self.data_dir}.")
        split = self.split or (task.train_split if training else task.evaluation_split)
        rows = task_rows(task, split, data_dir=self.file or self.data_dir, limit=self.limit)
        if not rows:
            raise ValueError(f"Task {task.name!r} has no rows in split {split!r} here.")
        task.examples(rows)
        return Contents(task, rows, [], self.max_length)


@dataclass(frozen=True)
class Contents:
    """What a source holds: `rows` of a task, or `samples` of text where there is no task."""

    task: Task | None
    rows: list[dict[str, Any]]
    samples: list[Sample]
    max_length: int | None
    fixed_spans: bool = False

    def features(
        self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, seed: int = 0
    ) -> list[Feature]:
        """Return the rows or texts as tokens for a model of this configuration.

        Raises:
            ValueError: see `text_features`.
        """
        kind: dict[str, Any] = {"encoder_decoder": config.is_encoder_decoder}
        if self.task is not None:
            return task_features(self.task, self.rows, tokenizer, max_length=self.max_length, **kind)
        # Not every family has a longest input.
        longest = config.get_text_config().to_dict().get("max_position_embeddings") or TEXT_LENGTH
        length = self.max_length or min(TEXT_LENGTH, longest)
        noise = SpanNoise(fixed_spans=self.fixed_spans)
        features = text_features(self.samples, tokenizer, max_length=length, seed=seed, noise=noise, **kind)
        if not features:
            raise ValueError("The text holds nothing to predict: it is of one token at most.")
        return features
