"""Pruning the rows of S while the model learns: importance, the cubic schedule, a callback (paper, section 3.2)."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.files import replaced, write_json
from hf_mcsmoe.layers.batches import Batch, each, forward
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.layers.sharded import local, part_of
from hf_mcsmoe.low_rank.config import KEEP
from hf_mcsmoe.low_rank.importance import AGGREGATES, IMPORTANCE, RowAverages, Scores, row_scores
from hf_mcsmoe.methods.checks import check_value
from hf_mcsmoe.methods.registry import method_name, unknown
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.losparse_mcsmoe import SparsePart, sparse_parts

STATE_FILE, OPTIONS_FILE = "sparsification.safetensors", "sparsification.json"


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

    One threshold over all weights; ties go to the first row. Where several processes train, all prune the rows that
    the first one chooses, so that rounding cannot part them.

    Args:
        scores: [*, out] per weight, as in `sparse_parts`; only rows are sorted and sent, never entries.
    """
    parts = sparse_parts(model)
    kept = torch.cat([part.kept.flatten() for part in parts.values()])
    number = round(keep * len(kept))
    if number < int(kept.sum()):
        chosen = _highest(scores, parts, number)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(chosen, src=0)
        shares = chosen.split([part.kept.numel() for part in parts.values()])
        for part, share in zip(parts.values(), shares, strict=True):
            part.kept.logical_and_(share.view(part.kept.shape).to(part.kept.device))
    for part in parts.values():
        local(part.weight.data).mul_(part_of(part.kept, part.weight)[..., None])


def _highest(scores: Scores, parts: dict[str, SparsePart], number: int) -> torch.Tensor:
    """Return which rows of all parts, in a row, have the highest scores: uint8, on the device of the first part."""
    values = [scores[name].float().cpu().masked_fill(~part.kept.cpu(), -torch.inf) for name, part in parts.items()]
    flat = torch.cat([value.flatten() for value in values])
    chosen = torch.zeros(len(flat), dtype=torch.uint8)
    chosen[flat.argsort(descending=True, stable=True)[:number]] = 1
    return chosen.to(next(iter(parts.values())).kept.device)


def zero_shot_importance(
    model: PreTrainedModel, batches: Iterable[Batch], *, importance: str = "sensitivity", aggregate: str = "mean"
) -> Scores:
    """Return row scores [*, out] per weight from backward passes alone, a mean over the batches; no weight changes.

    For a compact model without training: `prune_rows(model, scores, keep)`, then `compact(model)`.

    Args:
        batches: dictionaries for `model(**batch)`, with labels.

    Raises:
        ValueError: no batches, one without labels, a model without S in the training form, or one whose S is frozen.
    """
    parts, sums, count = _parts(model), Scores(), 0
    _check_scored(parts, importance)
    mode = model.training
    model.eval()
    for count, batch in enumerate(apart(model, each(as_batches(batches, model))), start=1):  # noqa: B007
        model.zero_grad(set_to_none=True)
        loss = forward(model, batch).loss
        if loss is None:
            raise ValueError(f"The model gave no loss for a batch of {', '.join(batch)}: importance needs labels.")
        if loss.requires_grad:
            loss.backward()
        for name, score in row_scores(parts, importance, aggregate).items():
            sums[name] = sums[name] + score if name in sums else score
    model.zero_grad(set_to_none=True)
    model.train(mode)
    empty = {name: torch.zeros(part.kept.shape) for name, part in parts.items()}
    return {name: sums.get(name, value) / count for name, value in empty.items()}


def _parts(model: nn.Module) -> dict[str, SparsePart]:
    parts = sparse_parts(model)
    if not parts:
        raise ValueError(
            "The model has no low rank + sparse weights in their training form; call decompose_experts first."
        )
    return parts


def _check_scored(parts: dict[str, SparsePart], importance: str | Callable) -> None:
    """Raise ValueError where no S has a gradient, which its importance needs."""
    method = IMPORTANCE[importance]
    weights = [local(part.weight.detach()) for part in parts.values()]
    rows = [weight.reshape(-1, weight.shape[-1])[:1].float() for weight in weights]
    without = all(method(row, None) is None for row in rows)
    if without and not any(part.weight.requires_grad for part in parts.values()):
        raise ValueError(
            f"importance={method_name(importance)!r} needs the gradient of S, which is frozen: train all or the "
            "experts (train_parts), let S require its gradient, or take importance='magnitude'."
        )


class SparsificationCallback(TrainerCallback):
    """Prunes rows of S along the cubic schedule while a Trainer trains.

    Scores are exponential averages (see `RowAverages`) of each row's importance, taken before every optimiser step
    from the accumulated gradient after clipping, which scales a step's scores alike. Data-parallel processes have the
    same gradients, averaged over them, and a weight that none of them used has none; all prune the rows that the first
    one chooses. Saved in each checkpoint; a run that resumes goes on exactly.
    """

    def __init__(
        self,
        keep: float = KEEP,
        *,
        start: int | float = 0.04,
        end: int | float = 0.16,
        importance: str | Callable = "sensitivity",
        beta: float = 0.85,
        aggregate: str = "mean",
        uncertainty: bool = False,
        beta2: float = 0.95,
    ) -> None:
        """Make a callback.

        Args:
            keep: share of rows kept in the end.
            start: steps (int) or share of training (float) before the first row is pruned; the paper has 400 of 10000.
            end: steps or share at the end with `keep` already reached; the paper has 1600 of 10000.
            importance: a name of `IMPORTANCE`, or a callable like those.
            beta: of the averages of importance.
            aggregate: how the entries of a row make its score: mean, sum or max.
            uncertainty: multiply an entry's importance by its uncertainty (PLATON); takes 8 bytes an entry of S.
            beta2: of the averages of uncertainty.

        Raises:
            ValueError: a number out of range or an unknown name.
        """
        for name, given in (("keep", keep), ("beta", beta), ("beta2", beta2), ("start", start), ("end", end)):
            check_value(name, given, float)
        IMPORTANCE.check(importance)
        if aggregate not in AGGREGATES:
            raise ValueError(unknown("aggregate", aggregate, list(AGGREGATES)))
        if not 0 <= keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share in [0, 1].")
        for name, value in (("beta", beta), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be in [0, 1).")
        for name, value in (("start", start), ("end", end)):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (0 <= value <= 1 if isinstance(value, float) else value >= 0):
                raise ValueError(
                    f"{name}={value!r} must be a number of steps (a whole number from 0 on) or a share of training (a "
                    "float in [0, 1])."
                )
        self.keep, self.start, self.end = keep, start, end
        self.importance, self.beta, self.aggregate = importance, beta, aggregate
        self.beta2 = beta2 if uncertainty else None
        self.averages = self._new_averages()

    @property
    def scores(self) -> Scores:
        """The scores [*, out] of the rows of each S, as far as they are known."""
        return self.averages.scores

    def _new_averages(self) -> RowAverages:
        return RowAverages(self.importance, self.aggregate, self.beta, self.beta2)

    def options(self, total: int) -> dict[str, Any]:
        """Return what must not change when a run is resumed."""
        start, end = self._steps(total)
        return {
            "keep": self.keep,
            "start": start,
            "end": end,
            "total": total,
            "importance": method_name(self.importance),
            "beta": self.beta,
            "aggregate": self.aggregate,
            "beta2": self.beta2,
        }

    def _steps(self, total: int) -> tuple[int, int]:
        start, end = (round(value * total) if isinstance(value, float) else value for value in (self.start, self.end))
        return start, end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the schedule, and take up the averages of the checkpoint that the run resumes from.

        What is saved of the model holds the share of rows that is pruned to, whatever its decomposition had meant.

        Raises:
            ValueError: a schedule longer than training, another one than that of the checkpoint, nothing to prune.
        """
        _check_scored(_parts(model), self.importance)
        start, end = self._steps(state.max_steps)
        if start + end >= state.max_steps:
            raise ValueError(
                f"The schedule's start ({start}) and end ({end}) leave none of the {state.max_steps} training steps "
                "to prune in: train longer, or lower them."
            )
        self.averages = self._new_averages()
        # Inside whatever wraps it for training.
        whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if whole is not None and compression(whole):
            write_description(whole, keep=self.keep)
        if state.global_step:
            self._resume(_resumed_folder(args, state), state.max_steps)

    def _resume(self, folder: Path, total: int) -> None:
        written, options = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8")), self.options(total)
        changed = [name for name, value in options.items() if written.get(name) != value]
        if changed:
            what = ", ".join(f"{name} {written.get(name)} -> {options[name]}" for name in changed)
            raise ValueError(f"{folder} was trained with another schedule ({what}): resume with the same one.")
        self.averages.load(load_file(folder / STATE_FILE))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Average the importance of the rows."""
        self.averages.update(sparse_parts(model))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prune down to the share of the schedule, and set pruned rows to zero, whatever momentum made of them."""
        start, end = self._steps(state.max_steps)
        share = kept_share(state.global_step + 1, state.max_steps, self.keep, start, end)
        if share < 1:
            zeros = {name: torch.zeros(part.kept.shape) for name, part in sparse_parts(model).items()}
            prune_rows(model, zeros | self.scores, share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the averages and the schedule into the checkpoint."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            with replaced(folder / STATE_FILE) as new:
                save_file(self.averages.state(), new)
            write_json(folder / OPTIONS_FILE, self.options(state.max_steps))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _resumed_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the checkpoint that a run resumes from, of which callbacks are not told.

    It is that of `args.resume_from_checkpoint` or that of this step in `output_dir`, if it holds the run's history.

    Raises:
        ValueError: neither does, or it was saved without a SparsificationCallback.
    """
    given = args.resume_from_checkpoint
    folders = [Path(given)] if isinstance(given, str) else []
    folders.append(_checkpoint(args, state))
    for folder in folders:
        file = folder / TRAINER_STATE_NAME
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if written.get("global_step") == state.global_step and written.get("log_history") == state.log_history:
            break
    else:
        raise ValueError(
            f"Found no checkpoint of this run at step {state.global_step} in {' or '.join(map(str, folders))}, so the "
            "averages of the rows' scores are lost. Where you resume from a folder elsewhere, name it in "
            "`resume_from_checkpoint` of the training arguments as well."
        )
    if not (folder / OPTIONS_FILE).is_file() or not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} was not saved with a SparsificationCallback, so its averages are lost: train from the "
            "start, or from a checkpoint that holds sparsification.safetensors."
        )
    return folder
