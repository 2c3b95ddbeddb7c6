"""How stages of a compression do on rows that nothing was fitted to: loss, and divergence from the original.

Of the original's distributions a bounded sample is kept, so that it may be used up or changed in the meantime.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from hf_mcsmoe.layers.batches import Batch, evaluation_mode, forward
from hf_mcsmoe.layers.source import Source, source_of
from hf_mcsmoe.record import Quality

# Bytes for the original's distributions [positions, V] in float32: every position of a small model, some of a large.
MEMORY_LIMIT = 1_000_000_000
# Positions whose logits are turned to float32 at a time.
CHUNK = 256

Progress = Callable[[int, int], None]
# Logits [N, V] of the positions that count and, where there is something to be right about, its ids int [N].
Predictions = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Judge:
    """Measures stages against the original on held-out rows; without rows it measures nothing.

    Args:
        batches: dictionaries for `model(**batch)` that no statistic, repair or factor was fitted to.
        check: others, of text of another kind than what was fitted to, whose figures are told apart.
        memory_limit: bytes for the original's distributions.
        progress: called as `progress(batches done, batches)`.
    """

    batches: Sequence[Batch]
    check: Sequence[Batch] = ()
    memory_limit: int = MEMORY_LIMIT
    progress: Progress | None = None
    quality: dict[str, Quality] = field(default_factory=dict)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)

    @property
    def all_batches(self) -> list[Batch]:
        """The held-out batches, then those of other text."""
        return [*self.batches, *self.check]

    def remember(self, model: PreTrainedModel | Source, stage: str = "original") -> None:
        """Measure the original's loss, and keep its distributions at evenly spread positions of each batch."""
        self._run(self.of_original(stage), model)

    def measure(self, stage: str, model: PreTrainedModel | Source) -> None:
        """Measure a stage: its loss, and its divergence from the original where that was kept.

        A `Folder` runs block by block, on all batches together.
        """
        if self.kept:
            self._run(self.of_stage(stage), model)

    def of_original(self, stage: str = "original") -> "Measure":
        """Return what takes the original's predictions, batch after batch, for `remember`."""
        return Measure(self, stage, is_original=True)

    def of_stage(self, stage: str) -> "Measure":
        """Return what takes a stage's predictions, batch after batch, for `measure`."""
        return Measure(self, stage)

    @torch.no_grad()
    def _run(self, measure: "Measure", model: PreTrainedModel | Source) -> None:
        source = source_of(model)

        def take(given: tuple[int, Batch]) -> None:
            measure.take(given[0], predictions(source.model, given[1]))

        with evaluation_mode(source.model), source.streamed() as run:
            run(take, enumerate(self.all_batches))
        measure.close()


class Measure:
    """The figures of one stage, of predictions that come batch after batch."""

    def __init__(self, judge: Judge, stage: str, *, is_original: bool = False) -> None:
        """Measure a stage for a judge, who keeps the original's distributions."""
        self.judge, self.stage, self.is_original = judge, stage, is_original
        self._sums, self._is_any, self._taken = (_Sums(), _Sums()), False, 0

    def take(self, number: int, found: Predictions | None) -> None:
        """Take what is said of the batch of a number; of one of which nothing can be compared, nothing."""
        judge, is_check = self.judge, number >= len(self.judge.batches)
        if judge.progress:
            judge.progress(number + 1, len(judge.all_batches))
        if found is None or not len(found[0]):
            return
        self._is_any, sums, logits = True, self._sums[is_check], found[0]
        sums.add_loss(*found)
        if self.is_original:
            count = max(1, judge.memory_limit // (4 * logits.shape[-1] * len(judge.all_batches)))
            chosen = torch.linspace(0, len(logits) - 1, min(count, len(logits))).round().long()
            judge.kept.append((chosen, log_softmax(logits[chosen.to(logits.device)].float(), -1).cpu()))
            sums.compared += len(chosen)
        else:
            chosen, expected = judge.kept[self._taken]
            self._taken += 1
            sums.add_divergence(expected, logits[chosen.to(logits.device)])

    def close(self) -> None:
        """Let the judge know the stage's figures, where there are any."""
        if self._is_any:
            self.judge.quality[self.stage] = _quality(*self._sums)


@dataclass
class _Sums:
    """Sums over positions, in float64."""

    loss: float = 0.0
    divergence: float = 0.0
    labels: int = 0
    compared: int = 0

    def add_loss(self, logits: torch.Tensor, labels: torch.Tensor | None) -> None:
        if labels is None:
            return
        for part, wanted in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
            self.loss += float(cross_entropy(part.float(), wanted, reduction="sum"))
        self.labels += len(labels)

    def add_divergence(self, expected: torch.Tensor, logits: torch.Tensor) -> None:
        for old, new in zip(expected.split(CHUNK), logits.split(CHUNK), strict=True):
            theirs = log_softmax(new.float(), -1).cpu()
            self.divergence += float(kl_div(theirs, old, reduction="sum", log_target=True))
        self.compared += len(expected)

    def means(self) -> tuple[float | None, float | None]:
        """Return loss and divergence per position; None where there is no such position."""
        loss = self.loss / self.labels if self.labels else None
        return loss, self.divergence / self.compared if self.compared else None


def _quality(held_out: _Sums, check: _Sums) -> Quality:
    return Quality(*held_out.means(), *check.means())


def predictions(model: PreTrainedModel, batch: Batch) -> Predictions | None:
    """Return what a model says at the positions of a batch that count; None where that is no distribution.

    Of a model that writes text: each label [batch, length] or, without labels and encoder, each next token. Of a
    classifier: each text, or each token that is no padding.
    """
    outputs = forward(model, batch)
    if "logits" not in outputs or outputs["logits"].ndim not in (2, 3):
        return None
    logits: torch.Tensor = outputs["logits"]
    if model.can_generate():
        return _next_tokens(logits, _labels(batch), shifted=not model.config.is_encoder_decoder)
    if logits.shape[-1] < 2 or model.config.problem_type in ("regression", "multi_label_classification"):
        return None
    if logits.ndim == 2:
        return logits, _classes(batch.get("labels"), len(logits))
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return logits.flatten(0, 1), None
    return logits[mask.to(logits.device) != 0], None


def _labels(batch: Batch) -> torch.Tensor | None:
    """Return the ids [batch, length] that are to be told, -100 where none is; None where a batch has no ids."""
    labels, mask, tokens = (batch.get(name) for name in ("labels", "attention_mask", "input_ids"))
    if labels is not None or tokens is None:
        return labels
    return tokens if mask is None else tokens.masked_fill(mask == 0, -100)


def _next_tokens(logits: torch.Tensor, labels: torch.Tensor | None, *, shifted: bool) -> Predictions | None:
    if labels is None or logits.shape[:-1] != labels.shape:
        return None
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    labels = labels.to(logits.device)
    counted = labels != -100
    return logits[counted], labels[counted]


def _classes(labels: Any, rows: int) -> torch.Tensor | None:
    """Return the class int [rows] of each text, where the labels are classes."""
    is_class = isinstance(labels, torch.Tensor) and labels.shape == (rows,) and not labels.is_floating_point()
    return labels if is_class else None


def judge_of(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None,
    check: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> Judge:
    """Return what measures stages against `model`, which is measured at once; nothing is without batches."""
    judge = Judge(list(batches or ()), list(check or ()), progress=progress)
    judge.remember(model)
    return judge
