"""The router of a plain model fitted on calibration rows, against the original or the merged model.

Tried in turn: the rows as they were combined; a ridge regression of the router's logits on its inputs; then the router
alone, distilled from whichever does better. What does best on held-out rows stays.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.distillation.losses import top_kl_divergence, top_log_probs
from hf_mcsmoe.evaluation.held_out import Judge, predictions
from hf_mcsmoe.export.form import PlainForm
from hf_mcsmoe.export.ridge import RIDGES, router_sums
from hf_mcsmoe.export.router_rows import BIAS
from hf_mcsmoe.export.write import Experts, State, dense_experts, plain_state
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.progress import Progress, silent
from hf_mcsmoe.record import Calibration, Quality

# Log-probabilities of the teacher that are stored of a position.
TOP_K = 64
# Names of the stages that are judged: the merged model, and its plain form with the router as each step left it.
MERGED, COMBINED, RIDGE, DISTILLED = "merged", "plain", "plain, router by ridge", "plain, router distilled"


@dataclass(frozen=True)
class RouterFit:
    """What a plain router is fitted to.

    Args:
        batches: dictionaries for `model(**batch)`.
        held_out: others, which decide whether a step helped, and are told of.
        original: the model that was compressed, or None to imitate the merged model.
        steps: of the distillation; 0 for the closed form alone.
        learning_rate: of Adam, relative to the mean size of the router's rows.
        check: batches of text of another kind, of which is told as well.
        calibration: what is known of the data, for the card.
    """

    batches: Sequence[Batch]
    held_out: Sequence[Batch] = ()
    original: PreTrainedModel | None = None
    steps: int = 200
    learning_rate: float = 1e-2
    check: Sequence[Batch] = ()
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Refuse a fit without rows, or numbers out of range.

        Raises:
            ValueError: as said.
        """
        if not self.batches or not self.held_out:
            raise ValueError("A router is fitted to calibration rows and judged on held-out ones: give both.")
        if self.steps < 0 or self.learning_rate <= 0:
            raise ValueError(f"steps={self.steps} must be 0 or more, and learning_rate={self.learning_rate} above 0.")

    @property
    def data(self) -> Calibration:
        """What is known of the data: at least the numbers of rows."""
        if self.calibration is not None:
            return self.calibration
        fitted, held_out, check = (sum(map(_rows, part)) for part in (self.batches, self.held_out, self.check))
        return Calibration(rows=fitted + held_out, held_out=held_out, check_rows=check)


@dataclass(frozen=True)
class Fitted:
    """The plain routers that did best, as `router_tensors`, and what was measured on the held-out rows.

    `quality` is against the original, empty without one; `to_merged` the divergence from the merged model, in nats per
    position, and `check_to_merged` the same on text of another kind. All by stage, of which `taken` is the one that
    stays.
    """

    rows: dict[str, State]
    taken: str
    quality: dict[str, Quality]
    to_merged: dict[str, float]
    check_to_merged: dict[str, float]


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def plain_model_of(form: PlainForm, rows: dict[str, State], experts: Experts = dense_experts) -> PreTrainedModel:
    """Return the plain model itself, in evaluation mode, in the memory of the device where the compressed one begins.

    Its routers may be changed: they share nothing with `rows`.

    Args:
        experts: the dense experts of a layer; see `dense_experts`.
    """
    device = form.model.device if form.model.device.type != "meta" else torch.device("cpu")
    with torch.device("meta"):
        model = type(form.plain)._from_config(form.plain.config, dtype=form.model.dtype)
    own = {layer: {name: tensor.clone() for name, tensor in held.items()} for layer, held in rows.items()}
    state = {name: tensor.to(device) for name, tensor in plain_state(form, own, experts).items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    kept = {**dict(form.model.named_parameters()), **dict(form.model.named_buffers())}
    for path, module in model.named_modules():  # what no checkpoint has
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                name = f"{path}.{key}".lstrip(".")
                if tensor is not None and tensor.is_meta and name in kept:
                    value = kept[name].detach().to(device, copy=True)
                    held[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    return model.eval().requires_grad_(False)


def fit_router(
    form: PlainForm,
    rows: dict[str, State],
    fit: RouterFit,
    experts: Experts = dense_experts,
    progress: Progress | None = None,
) -> Fitted:
    """Return the routers of a plain form that do best on held-out rows; the merged model is in memory.

    Args:
        experts: the dense experts of a layer, as whoever loads the checkpoint computes with them.

    Raises:
        ValueError: the model tells no distribution to compare.
    """
    model, tell = plain_model_of(form, rows, experts), progress or silent
    judged, routers = _Judged(form, fit), _Routers(model, rows)
    stages = {COMBINED: (judged.kl(COMBINED, model), rows)}
    for number, solved in enumerate(_solutions(form, rows, fit)):
        routers.load(solved)
        tell("fitting the router", number + 1, len(RIDGES))
        stages[RIDGE] = min(stages.get(RIDGE, (torch.inf, rows)), (judged.kl(RIDGE, model), solved), key=_first)
    routers.load(min(stages.values(), key=_first)[1])
    if fit.steps:
        routers.distil(fit, fit.original or form.model, tell)
        stages[DISTILLED] = judged.kl(DISTILLED, model), routers.held()
    taken = min(stages, key=lambda stage: stages[stage][0])
    routers.load(stages[RIDGE][1])
    judged.kl(RIDGE, model)  # the best of them, not the last
    return Fitted(stages[taken][1], taken, judged.quality, judged.to_merged("kl"), judged.to_merged("check_kl"))


def _first(pair: tuple[float, dict[str, State]]) -> float:
    return pair[0]


def _solutions(form: PlainForm, rows: dict[str, State], fit: RouterFit) -> Iterator[dict[str, State]]:
    """Yield the routers that each ridge gives; a layer whose logits are no product of its inputs stays as it is."""
    sums = router_sums(form, fit.batches)
    for ridge in RIDGES:
        yield {name: {**held, **sums[name].solved(held, ridge)} for name, held in rows.items()}


class _Judged:
    """Measures stages on the held-out rows: against the original, if there is one, and against the merged model."""

    def __init__(self, form: PlainForm, fit: RouterFit) -> None:
        self.merged = Judge(list(fit.held_out), list(fit.check))
        self.merged.remember(form.model, MERGED)
        self.original: Judge | None = None
        if fit.original is not None:
            self.original = Judge(list(fit.held_out), list(fit.check))
            self.original.remember(fit.original)
            self.original.measure(MERGED, form.model)
        if not self.merged.kept:
            raise ValueError(
                f"{type(form.model).__name__} tells no distribution on these rows to fit a router to: export without "
                "data."
            )

    def kl(self, stage: str, model: PreTrainedModel) -> float:
        """Measure a stage, and return its divergence from the original, or from the merged model without one.

        Raises:
            ValueError: the held-out rows have no position to compare.
        """
        self.merged.measure(stage, model)
        if self.original is not None:
            self.original.measure(stage, model)
        found = (self.original or self.merged).quality[stage].kl
        if found is None:
            raise ValueError("No position of the held-out rows tells routers apart: hold longer rows out.")
        return found

    @property
    def quality(self) -> dict[str, Quality]:
        """What was measured against the original; nothing without one."""
        return {} if self.original is None else self.original.quality

    def to_merged(self, name: str) -> dict[str, float]:
        """Return the divergence of each stage from the merged model, `kl` or `check_kl`."""
        found = {stage: vars(value)[name] for stage, value in self.merged.quality.items() if stage != MERGED}
        return {stage: value for stage, value in found.items() if value is not None}


class _Routers:
    """The tensors of a plain model's routers, which are changed in place."""

    def __init__(self, model: PreTrainedModel, rows: dict[str, State]) -> None:
        self.model = model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.tensors = {layer: {name: tensors[name] for name in held} for layer, held in rows.items()}

    def load(self, rows: dict[str, State]) -> None:
        """Let the routers hold other values."""
        for layer, held in self.tensors.items():
            for name, tensor in held.items():
                tensor.data.copy_(rows[layer][name])

    def held(self) -> dict[str, State]:
        """Return a copy of what they hold."""
        return {
            layer: {name: tensor.detach().clone() for name, tensor in held.items()}
            for layer, held in self.tensors.items()
        }

    def distil(self, fit: RouterFit, teacher: PreTrainedModel, tell: Progress) -> None:
        """Train the routers' matrices and biases, and nothing else, on what the teacher says of the rows.

        In float32, whatever the model is in. The step falls linearly to nothing.
        """
        held = {name: tensor for layer in self.tensors.values() for name, tensor in layer.items()}
        trained = [
            tensor.requires_grad_(True)
            for name, tensor in held.items()
            if isinstance(tensor, nn.Parameter) and (tensor.ndim == 2 or name.rpartition(".")[2] == BIAS)
        ]
        masters = [tensor.detach().float().clone() for tensor in trained]
        groups = [{"params": [master], "lr": fit.learning_rate * _size(master)} for master in masters]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit.steps)
        with tempfile.TemporaryDirectory() as folder:
            files = _stored(teacher, fit.batches, Path(folder))
            for number, (batch, file) in enumerate(islice(cycle(files), fit.steps), start=1):
                _backward(self.model, batch, file)
                for tensor, master in zip(trained, masters, strict=True):
                    if tensor.grad is not None:
                        master.grad, tensor.grad = tensor.grad.float(), None
                optimizer.step()
                falling.step()
                for tensor, master in zip(trained, masters, strict=True):
                    tensor.data.copy_(master)
                tell("distilling the router", number, fit.steps)
        self.model.requires_grad_(False)


def _size(tensor: torch.Tensor) -> float:
    """Return the mean size of a tensor's entries, 1 where all are 0."""
    return float(tensor.square().mean().sqrt()) or 1.0


@torch.no_grad()
def _stored(teacher: PreTrainedModel, batches: Sequence[Batch], folder: Path) -> list[tuple[Batch, Path]]:
    """Return the batches with a file each of the teacher's largest log-probabilities at the positions that count."""
    files = []
    with evaluation_mode(teacher):
        for number, batch in enumerate(batches):
            found = predictions(teacher, batch)
            if found is not None and len(found[0]):
                file = folder / f"{number}.pt"
                torch.save(top_log_probs(found[0], 1.0, min(TOP_K, found[0].shape[-1])), file)
                files.append((batch, file))
    return files


def _backward(model: PreTrainedModel, batch: Batch, file: Path) -> None:
    """Leave in the routers the gradient of the mean divergence from what a file holds of the teacher."""
    logits, _ = predictions(model, batch) or (None, None)
    if logits is None:
        return
    top, ids, rest = (part.to(logits.device) for part in torch.load(file))
    (top_kl_divergence(logits, top, ids, rest, 1.0) / len(logits)).backward()
