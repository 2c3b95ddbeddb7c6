"""Distillation of a compressed model from its original: Trainer subclasses with a KD loss (paper, section 3.1)."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_mcsmoe.adapters import moe_layers
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.losses import cross_entropy, distillation_sums, reference_kl_divergence, squared_error
from hf_mcsmoe.model_card import add_to_card
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.plan import public_name
from hf_mcsmoe.registry import unknown

TRAIN_PARTS = ("all", "experts", "routers")
CARD_TEXT = (
    "Trained for {steps} steps on the task's loss and `{weight} x T^2 x KL` from {teacher} at temperature T = "
    "{temperature}\n(trained: {parts}; routers {routers}). Last losses: {losses}."
)


@dataclass
class DistillationOptions:
    """What distillation adds to the arguments of a Trainer, with the paper's optimiser as defaults."""

    kd_weight: float = field(default=0.2, metadata={"help": "weight of the divergence from the teacher"})
    kd_temperature: float = field(default=2.0, metadata={"help": "temperature T of both distributions"})
    hidden_weight: float = field(default=0.0, metadata={"help": "weight of the error of the last hidden states"})
    reference_kd: bool = field(
        default=False, metadata={"help": "the KL of the paper's released code: no T^2, no mask"}
    )
    train_parts: str = field(default="all", metadata={"help": f"what is trained: {', '.join(TRAIN_PARTS)}"})
    freeze_routers: bool = field(default=True, metadata={"help": "leave routers as they are, as in the paper"})
    teacher_dtype: str = field(default="auto", metadata={"help": "dtype of a teacher given by name"})
    teacher_device_map: str | None = field(default=None, metadata={"help": "device map of a teacher given by name"})
    allow_uncompressed: bool = field(default=False, metadata={"help": "accept a student that is not compressed"})
    # Trainer does not look for such under gradient checkpointing, whose reentrant kind (not the default) forbids it.
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "do not wait for the gradient of an expert that no token of a process chose"}
    )

    def check(self) -> None:
        """Raise ValueError for a number out of range or a name that does not exist."""
        if self.train_parts not in TRAIN_PARTS:
            raise ValueError(unknown("train_parts", self.train_parts, list(TRAIN_PARTS)))
        for name in ("kd_weight", "hidden_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.kd_temperature <= 0:
            raise ValueError(f"kd_temperature={self.kd_temperature} must be positive.")


@dataclass
class DistillationArguments(DistillationOptions, TrainingArguments):
    """`TrainingArguments` with the options of distillation; AdamW as in the paper (eps 1e-6, betas 0.9 and 0.98)."""

    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.01
    warmup_steps: float = 16

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


@dataclass
class DistillationSeq2SeqArguments(DistillationOptions, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the options of distillation and the paper's optimiser."""

    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.01
    warmup_steps: float = 16

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


class DistillationTrainer(Trainer):
    """A `Trainer` that distils a compressed model from its original.

    loss = cross entropy + kd_weight * T^2 * KL(teacher || student) [+ hidden_weight * error of the last hidden
    states], each a mean over the labels that count, over all of an accumulated batch and all processes. A library
    model's own router losses are left out: routers are frozen as a rule.
    """

    args: Any
    model: Any

    def __init__(self, model: PreTrainedModel, *args: Any, teacher: PreTrainedModel | str, **kwargs: Any) -> None:
        """Take the arguments of the Trainer, and the teacher: a model, a folder or a Hub id.

        Raises:
            ValueError: a student that is not compressed, or a teacher with another vocabulary.
        """
        options = kwargs.get("args") or (args[0] if args else None)
        if not isinstance(options, DistillationOptions):
            raise TypeError(f"args must be DistillationArguments or DistillationSeq2SeqArguments, not {options!r}.")
        if not getattr(model.config, "mcsmoe", None) and not options.allow_uncompressed:
            raise ValueError(
                f"{type(model).__name__} is not compressed: merge its experts first, or set allow_uncompressed."
            )
        if isinstance(teacher, str):
            teacher = load_model(teacher, dtype=options.teacher_dtype, device_map=options.teacher_device_map)
        check_vocabulary(model, teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        choose_parameters(model, options.train_parts, options.freeze_routers)
        super().__init__(model, *args, **kwargs)
        if not getattr(teacher, "hf_device_map", None):
            nn.Module.to(self.teacher, self.args.device)
        # The loss below divides by the labels of the whole accumulated batch, which Trainer counts for such models.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not model.config.is_encoder_decoder
        self._terms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._logged_step = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the student's outputs where asked for.

        Raises:
            ValueError: inputs without labels, or none that counts in the whole batch.
        """
        if "labels" not in inputs:
            raise ValueError(f"Distillation needs labels; the batch has {', '.join(inputs)}.")
        options = self.args
        more = {"output_hidden_states": True} if options.hidden_weight else {}
        labels, inputs = inputs["labels"], self._without_labels(inputs)
        outputs = model(**inputs, **more)
        with torch.no_grad():
            theirs = self.teacher(**inputs, **more)
        student, teacher = outputs.logits, theirs.logits.to(outputs.logits.device)
        if not self.model.config.is_encoder_decoder:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # slices of the logits would be copies
        counted = labels != -100
        total = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        if not total and model.training:
            raise ValueError("No label of the batch counts (all are -100): the loss would be empty. Check the data.")
        share = 1 / total.to(student.device).clamp(min=1)
        if num_items_in_batch is not None and options.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # gradients are averaged over processes afterwards
        if options.reference_kd:
            kd = reference_kl_divergence(student, teacher, options.kd_temperature)
            kd = kd / (self.current_gradient_accumulation_steps if model.training else 1)
            terms = {"task_loss": cross_entropy(student, labels) * share, "kd_loss": kd}
        else:
            task, kd = distillation_sums(student, teacher, labels, options.kd_temperature)
            terms = {"task_loss": task * share, "kd_loss": kd * share}
        if options.hidden_weight:
            ours, reference = (_last_hidden(item) for item in (outputs, theirs))
            terms["hidden_loss"] = squared_error(ours, reference.to(ours.device), counted) * share
        weights = {"task_loss": 1.0, "kd_loss": options.kd_weight, "hidden_loss": options.hidden_weight}
        loss = sum(weights[name] * value for name, value in terms.items())
        if model.training:
            for name, value in terms.items():
                self._terms[name] += value.detach()
        return (loss, outputs) if return_outputs else loss

    def _without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what both models are given: with labels each would compute a loss of its own over its logits."""
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        if self.model.config.is_encoder_decoder and not rest.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            rest["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        return rest

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step.

        Raises:
            RuntimeError: the loss is not finite; the message names the last checkpoint.
        """
        if not self._terms:  # the first step since the last log, or after a resume
            self._logged_step = self.state.global_step
        loss = super().training_step(model, *args, **kwargs)
        if not torch.isfinite(loss):
            saved = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
            raise RuntimeError(
                f"The loss is {loss.item()} at step {self.state.global_step}; {last}. Lower the learning rate, or "
                "train in float32 or bfloat16 instead of float16."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each term of the loss, a mean over the steps since the last time, and the kept share of rows of S."""
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps and self._terms:
            for name, value in self._terms.items():
                logs[name] = float(self.accelerator.gather(value).mean()) / steps
            self._terms.clear()
            self._logged_step = self.state.global_step
            parts = sparse_parts(self.accelerator.unwrap_model(self.model)).values()
            if parts:
                kept, rows = sum(int(part.kept.sum()) for part in parts), sum(part.kept.numel() for part in parts)
                logs["kept_share"] = kept / rows
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and let the student's card say how."""
        self._terms.clear()
        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if isinstance(resumed, str | Path):  # for callbacks, which are not told
            self.args.resume_from_checkpoint = str(resumed)
        result = super().train(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model.config, "mcsmoe", None):
            add_to_card(model, "Distillation", self._card_text())
        return result

    def _card_text(self) -> str:
        history = [entry for entry in self.state.log_history if "task_loss" in entry]
        names = ("task_loss", "kd_loss", "hidden_loss", "kept_share")
        last = {name: value for name, value in (history[-1] if history else {}).items() if name in names}
        frozen = self.args.freeze_routers and self.args.train_parts != "routers"
        return CARD_TEXT.format(
            steps=self.state.global_step,
            weight=self.args.kd_weight,
            temperature=self.args.kd_temperature,
            teacher=public_name(self.teacher.name_or_path) or "the original model",
            parts=self.args.train_parts,
            routers="frozen" if frozen else "trained",
            losses=", ".join(f"{name} {value:.4f}" for name, value in last.items()) or "not logged",
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave a compressed model its own card, which saving it has written; others get the Trainer's."""
        if not getattr(self.accelerator.unwrap_model(self.model).config, "mcsmoe", None):
            super().create_model_card(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(Path(resume_from_checkpoint), self.accelerator.unwrap_model(model or self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class DistillationSeq2SeqTrainer(DistillationTrainer, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that distils a compressed encoder-decoder from its original."""


def check_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where the two models do not speak of the same tokens."""
    ours, theirs = (len(model.get_output_embeddings().weight) for model in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"The teacher has {theirs} tokens in its vocabulary, the student {ours}: a teacher must be the original "
            "model of the student, or one with the same tokenizer."
        )


def choose_parameters(model: PreTrainedModel, parts: str, freeze_routers: bool) -> None:
    """Let only the chosen parts of a model be trained: "all", its "experts" or its "routers"."""
    layers = moe_layers(model)
    routers = {id(parameter) for layer in layers for parameter in layer.router.parameters()}
    experts = {id(parameter) for layer in layers for _, parameter in layer.parameters}
    for parameter in model.parameters():
        is_router = id(parameter) in routers
        if parts == "routers":
            chosen = is_router
        elif parts == "experts":
            chosen = id(parameter) in experts
        else:
            chosen = not (is_router and freeze_routers)
        parameter.requires_grad_(chosen and parameter.is_floating_point())


def check_checkpoint(folder: Path, model: PreTrainedModel) -> None:
    """Raise ValueError where a Trainer's checkpoint was not written by this model."""
    file = folder / "config.json"
    if not file.is_file():
        return
    written = json.loads(file.read_text(encoding="utf-8"))
    ours = getattr(model.config, "mcsmoe", None) or {"layers": {}}
    theirs = written.get("mcsmoe") or {"layers": {}}
    maps = [{name: layer["expert_map"] for name, layer in item["layers"].items()} for item in (ours, theirs)]
    if maps[0] != maps[1]:
        raise ValueError(f"{folder} holds a checkpoint of another model: its experts are grouped differently.")


def _last_hidden(outputs: Any) -> torch.Tensor:
    states = outputs.get("decoder_hidden_states")
    return (states if states is not None else outputs["hidden_states"])[-1]
