"""Pruning the rows of S while the model learns: importance, the cubic schedule, a callback (paper, section 3.2)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mcsmoe.calibration import Batch, on_device
from hf_mcsmoe.modeling.losparse_mcsmoe import SparsePart, sparse_parts
from hf_mcsmoe.registry import Registry, unknown

IMPORTANCE = Registry("importance")
AGGREGATES = {
    "mean": lambda entries: entries.mean(-1),
    "sum": lambda entries: entries.sum(-1),
    "max": lambda entries: entries.amax(-1),
}
STATE_FILE, OPTIONS_FILE = "sparsification.safetensors", "sparsification.json"
Scores = dict[str, torch.Tensor]


@IMPORTANCE.register("sensitivity", paper="2306.11222")
def sensitivity(part: SparsePart) -> torch.Tensor | None:
    """Return `|s * dL/ds|` [*, out, in] (LoSparse, section 3.2); None before the first gradient."""
    return None if part.weight.grad is None else (part.weight.detach() * part.weight.grad).float().abs()


@IMPORTANCE.register("magnitude")
def magnitude(part: SparsePart) -> torch.Tensor | None:
    """Return `|s|` [*, out, in]."""
    return part.weight.detach().float().abs()


def kept_share(step: int, total: int, keep: float, start: int, end: int) -> float:
    """Return the share of rows to keep after `step` of `total` steps: a cubic from 1 down to `keep`.

    1 until step `start`; then `keep + (1 - keep) (1 - (t - start) / (total - start - end))^3`; `keep` in the last
    `end` steps (Merge, Then Compress, appendix; with the numerator `t - start`, which makes it continuous).
    """
    if step <= start:
        return 1.0
    if step >= total - end:
        return keep
    return keep + (1 - keep) * (1 - (step - start) / (total - start - end)) ** 3


def prune_rows(model: nn.Module, scores: Scores, keep: float) -> None:
    """Keep the share `keep` of all rows of S of the model, those of the highest scores; rows once pruned stay so.

    One threshold over all weights; ties go to the first row.

    Args:
        scores: [*, out] per weight, as in `sparse_parts`.
    """
    parts = sparse_parts(model)
    values = [scores[name].float().cpu().masked_fill(~part.kept.cpu(), -torch.inf) for name, part in parts.items()]
    flat = torch.cat([value.flatten() for value in values])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: round(keep * len(flat))]] = True
    for part, share in zip(parts.values(), chosen.split([value.numel() for value in values]), strict=True):
        part.kept.logical_and_(share.view(part.kept.shape).to(part.kept.device))
        part.weight.data.mul_(part.kept[..., None])


def row_scores(parts: dict[str, SparsePart], importance: str, aggregate: str = "mean") -> Scores:
    """Return the scores [*, out] of the rows of each S now; weights without a gradient are left out."""
    entries = {name: IMPORTANCE[importance](part) for name, part in parts.items()}
    return {name: AGGREGATES[aggregate](value) for name, value in entries.items() if value is not None}


def zero_shot_importance(
    model: PreTrainedModel, batches: Iterable[Batch], *, importance: str = "sensitivity", aggregate: str = "mean"
) -> Scores:
    """Return row scores [*, out] per weight from backward passes alone, a mean over the batches; no weight changes.

    Args:
        batches: dictionaries for `model(**batch)`, with labels.

    Raises:
        ValueError: no batches, or a model without S in the training form.
    """
    parts, sums, count = _parts(model), Scores(), 0
    mode = model.training
    model.eval()
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        model.zero_grad(set_to_none=True)
        model(**on_device(batch, model)).loss.backward()
        for name, score in row_scores(parts, importance, aggregate).items():
            sums[name] = sums[name] + score if name in sums else score
    model.zero_grad(set_to_none=True)
    model.train(mode)
    if count == 0:
        raise ValueError("The calibration set is empty: pass at least one batch.")
    empty = {name: torch.zeros(part.kept.shape) for name, part in parts.items()}
    return {name: sums.get(name, value) / count for name, value in empty.items()}


def _parts(model: nn.Module) -> dict[str, SparsePart]:
    parts = sparse_parts(model)
    if not parts:
        raise ValueError(
            "The model has no low rank + sparse weights in their training form; call decompose_experts first."
        )
    return parts


class SparsificationCallback(TrainerCallback):
    """Prunes rows of S along the cubic schedule while a Trainer trains.

    Scores are exponential averages, `beta * old + (1 - beta) * new`, of each row's importance, taken before every
    optimiser step from the accumulated gradient after clipping (which scales a step's scores alike). The averages are
    kept per row: for mean and sum of `|s * grad|` that equals averaging the entries; for max it is the average of the
    rows' maxima. All processes see the same gradients and so prune the same rows. Saved in each checkpoint; a run that
    resumes goes on exactly.
    """

    def __init__(
        self,
        keep: float = 0.10,
        *,
        start: int | float = 0.04,
        end: int | float = 0.16,
        importance: str = "sensitivity",
        beta: float = 0.85,
        aggregate: str = "mean",
    ) -> None:
        """Make a callback.

        Args:
            keep: share of rows kept in the end.
            start: steps (int) or share of training (float) before the first row is pruned; the paper has 400 of 10000.
            end: steps or share at the end with `keep` already reached; the paper has 1600 of 10000.
            importance: a name of `IMPORTANCE`.
            aggregate: how the entries of a row make its score: mean, sum or max.

        Raises:
            ValueError: a number out of range or an unknown name.
        """
        IMPORTANCE[importance]
        if aggregate not in AGGREGATES:
            raise ValueError(unknown("aggregate", aggregate, list(AGGREGATES)))
        if not 0 <= keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share in [0, 1].")
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta!r} must be in [0, 1).")
        self.keep, self.start, self.end = keep, start, end
        self.importance, self.beta, self.aggregate = importance, beta, aggregate
        self.scores: Scores = {}

    def options(self, total: int) -> dict[str, Any]:
        """Return what must not change when a run is resumed."""
        start, end = self._steps(total)
        return {
            "keep": self.keep,
            "start": start,
            "end": end,
            "total": total,
            "importance": self.importance,
            "beta": self.beta,
            "aggregate": self.aggregate,
        }

    def _steps(self, total: int) -> tuple[int, int]:
        start, end = (round(value * total) if isinstance(value, float) else value for value in (self.start, self.end))
        return start, end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the schedule, and take up the averages of the checkpoint that the run resumes from.

        Raises:
            ValueError: a schedule longer than training, another one than that of the checkpoint, nothing to prune.
        """
        _parts(model)
        start, end = self._steps(state.max_steps)
        if start + end >= state.max_steps:
            raise ValueError(
                f"The schedule's start ({start}) and end ({end}) leave none of the {state.max_steps} training steps "
                "to prune in: train longer, or lower them."
            )
        self.scores = {}
        if state.global_step == 0:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        resumed = args.resume_from_checkpoint
        folder = Path(resumed) if isinstance(resumed, str) else folder
        self._resume(folder, state.max_steps)

    def _resume(self, folder: Path, total: int) -> None:
        if not (folder / OPTIONS_FILE).is_file():
            raise ValueError(f"{folder} was not saved with a SparsificationCallback, so its averages are lost.")
        written = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
        changed = [name for name, value in self.options(total).items() if written.get(name) != value]
        if changed:
            what = ", ".join(f"{name} {written.get(name)} -> {self.options(total)[name]}" for name in changed)
            raise ValueError(f"{folder} was trained with another schedule ({what}): resume with the same one.")
        self.scores = load_file(folder / STATE_FILE)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Average the importance of the rows."""
        for name, score in row_scores(sparse_parts(model), self.importance, self.aggregate).items():
            old = self.scores.get(name)
            new = score * (1 - self.beta)
            self.scores[name] = new if old is None else old.to(score.device) * self.beta + new

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prune down to the share of the schedule, and set pruned rows to zero, whatever momentum made of them."""
        start, end = self._steps(state.max_steps)
        share = kept_share(state.global_step + 1, state.max_steps, self.keep, start, end)
        parts = sparse_parts(model)
        if share < 1 and len(self.scores) < len(parts):
            self.scores = {name: torch.zeros(part.kept.shape) for name, part in parts.items()} | self.scores
        if share < 1:
            prune_rows(model, self.scores, share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the averages and the schedule into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_file({name: score.contiguous().cpu() for name, score in self.scores.items()}, folder / STATE_FILE)
            (folder / OPTIONS_FILE).write_text(json.dumps(self.options(state.max_steps)) + "\n", encoding="utf-8")
