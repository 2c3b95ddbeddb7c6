"""Where commands take rows from: calibration text, a task, or text of the user's own."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import reduce
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.cli.display import notes
from hf_mcsmoe.cli.options import LAST_SEED, described
from hf_mcsmoe.cli.shares import Shared, counts_of, parsed
from hf_mcsmoe.data.calibration import Drawn, draw
from hf_mcsmoe.data.features import HELD_OUT, Feature, feature_batches, split_held_out, task_features, text_features
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.data.tasks import TASKS, Task, get_task, task_rows
from hf_mcsmoe.data.text import Sample, check_token_ids, read_samples
from hf_mcsmoe.progress import Progress, one_after_another, one_step, part_of, silent
from hf_mcsmoe.record import is_repo_id, public_name

TEXT_LENGTH = 512
# Samples of text of another kind that judge at least.
CHECK_SAMPLES = 32
KINDS = "a file (txt, json, jsonl, csv, parquet) or a data set (a folder or Hub id)"


@dataclass(frozen=True)
class Calibration:
    """The text that a model is compressed on."""

    data: list[str] = described(MISSING, f"calibration text, {KINDS}; may be repeated, FILE:0.3 for a share")
    check_data: list[str] | None = described(
        None, "text of another kind, that nothing is fitted to: the result is judged on it as well; may be repeated"
    )
    column: str | None = described(None, "column of the data with the text")
    target_column: str | None = described(None, "column with the target, for encoder-decoders")
    split: str = described("train", "split of a data set")
    num_samples: int = described(256, "calibration samples, an eighth of them held out to judge the result", min=1)
    max_length: int = described(512, "longest sample, in tokens", min=2)
    batch_size: int = described(8, "samples per forward", min=1)
    seed: int = described(0, "seed of the samples drawn and of random methods", min=0, max=LAST_SEED)

    def __post_init__(self) -> None:
        """Refuse to judge on what is fitted to.

        Raises:
            ValueError: the same data are given for both.
        """
        fitted = {name for name, _ in parsed(self.data)}
        for name, _ in parsed(self.check_data or []):
            if name in fitted:
                raise ValueError(f"--check-data {name} is --data as well, which is fitted to: name other text.")

    def read(self, progress: Progress = silent) -> list[Shared]:
        """Return the samples of each `--data`, with their shares of what is drawn; tells of the rows read.

        Raises:
            ValueError: there is no such data, no such column, or shares that do not add up.
        """
        return self._read(self.data, progress)

    def read_check(self) -> list[Shared]:
        """Return the same of each `--check-data`."""
        return self._read(self.check_data or [], silent)

    def _read(self, data: list[str], progress: Progress) -> list[Shared]:
        columns = {"column": self.column, "target_column": self.target_column}
        given = parsed(data)
        tell = one_after_another(progress, len(given))
        return [
            Shared(name, share, read_samples(name, **columns, split=self.split, progress=tell))
            for name, share in given
        ]

    @property
    def names(self) -> list[str]:
        """What others may know the data by: a Hub id, or the last part of a path."""
        return public_names(self.data)

    @property
    def check_names(self) -> list[str]:
        """The same of the text of another kind."""
        return public_names(self.check_data or [])

    def batches(
        self,
        data: list[Shared],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        progress: Progress = silent,
    ) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        """Return some of the samples as batches for `model(**batch)`: those to fit to, and those held out.

        Notes what was used of what there is.
        """
        features = self._features(data, tokenizer, model, self.num_samples, "calibration on", progress)
        parts = split_held_out(features)
        fitted, held_out = (feature_batches(part, tokenizer, self.batch_size, by_length=False) for part in parts)
        return fitted, held_out

    def batches_of(
        self,
        samples: dict[str, list[Sample]],
        counts: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
    ) -> dict[str, list[dict[str, torch.Tensor]]]:
        """Return so many samples of each label as batches for `model(**batch)`; a label of none is left out."""
        found = {}
        for (label, part), number in zip(samples.items(), counts, strict=True):
            if number:
                drawn = self._draw(
                    [Shared(label, None, part)], tokenizer, model.config.is_encoder_decoder, number, silent
                )
                check_token_ids(max(max(feature["input_ids"]) for feature in drawn.features), model)
                found[label] = feature_batches(drawn.features, tokenizer, self.batch_size, by_length=False)
        return found

    def check_batches(
        self, data: list[Shared], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> list[dict[str, torch.Tensor]]:
        """Return as many samples of the text of another kind as batches as are held out, or `CHECK_SAMPLES`."""
        if not data:
            return []
        number = max(self.num_samples // HELD_OUT, CHECK_SAMPLES)
        features = self._features(data, tokenizer, model, number, "checked on", silent)
        return feature_batches(features, tokenizer, self.batch_size, by_length=False)

    def _features(
        self,
        data: list[Shared],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        number: int,
        told: str,
        progress: Progress,
    ) -> list[Feature]:
        """Draw so many samples, and note what was used of what there is."""
        drawn = self._draw(data, tokenizer, model.config.is_encoder_decoder, number, progress)
        notes.print(f"{told} {drawn}", highlight=False)
        check_token_ids(max(max(feature["input_ids"]) for feature in drawn.features), model)
        return drawn.features

    def _draw(
        self,
        data: list[Shared],
        tokenizer: PreTrainedTokenizerBase,
        encoder_decoder: bool,
        number: int,
        progress: Progress,
    ) -> Drawn:
        """Draw samples of each data by its share, or else of all of them alike."""
        options: dict[str, Any] = {
            "max_length": self.max_length,
            "seed": self.seed,
            "encoder_decoder": encoder_decoder,
        }
        if all(part.share is None for part in data):
            samples = [sample for part in data for sample in part.samples]
            domains = [place for place, part in enumerate(data) for _ in part.samples]
            return draw(samples, tokenizer, num_samples=number, **options, domains=domains, progress=progress)
        counts = counts_of([part.share for part in data], number)
        sizes = [min(count, len(part.samples)) for part, count in zip(data, counts, strict=True)]
        drawn = [
            draw(
                part.samples,
                tokenizer,
                num_samples=count,
                **options,
                domains=[place] * len(part.samples),
                progress=part_of(progress, before, sum(sizes)),
            )
            for place, (part, count, before) in enumerate(
                zip(data, counts, accumulate(sizes, initial=0), strict=False)
            )
            if count
        ]
        return reduce(add, drawn)


def public_names(data: list[str]) -> list[str]:
    """Return Hub ids, with what stands behind a colon, as they are, and of paths the last part."""
    given = [name for name, _ in parsed(data)]
    return [name if is_repo_id(name.partition(":")[0]) else public_name(name) for name in given]


@dataclass(frozen=True)
class Source:
    """Where rows come from, as a user names it."""

    task: str | None = described(None, f"a task: {', '.join(TASKS)}")
    data: list[str] | None = described(None, f"text instead of a task: {KINDS}; may be repeated")
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
    )

    def read(self, *, training: bool, progress: Progress = silent) -> "Contents":
        """Return the rows, those to train on or those to evaluate on unless a split is named.

        Raises:
            ValueError: neither or both of a task and text, options of the other kind, no such task, file or split, or
                rows that do not fit the task.
        """
        if (self.task is None) == (not self.data):
            raise ValueError("Name what to read: either --task or --data.")
        of_tasks = {"--data-dir": self.data_dir, "--file": self.file}
        of_texts = {"--column": self.column, "--target-column": self.target_column}
        other, options = ("--task", of_tasks) if self.task is None else ("--data", of_texts)
        stray = [name for name, value in options.items() if value is not None]
        if stray:
            raise ValueError(f"{stray[0]} goes with {other}, which is not given.")
        if self.task is None:
            split = self.split or ("train" if training else "validation")
            samples = self._read_texts(split, progress)
            return Contents(None, [], samples[: self.limit], self.max_length, self.fixed_spans)
        with one_step("reading", progress):
            return self._read_task(get_task(self.task), training)

    def _read_texts(self, split: str, progress: Progress) -> list[Sample]:
        samples: list[Sample] = []
        given = parsed(self.data or [])
        options: dict[str, Any] = {"column": self.column, "target_column": self.target_column, "split": split}
        options["progress"] = one_after_another(progress, len(given))
        for name, share in given:
            if share is not None:
                raise ValueError(f"--data {name}:{share:g}: all rows are read here; only compress draws by shares.")
            samples += read_samples(name, **options)
        return samples

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
