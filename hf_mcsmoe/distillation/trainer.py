"""Distillation of a compressed model from its original: Trainer subclasses with a KD loss (paper, section 3.1)."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.distillation.arguments import DistillationOptions
from hf_mcsmoe.distillation.compressed_trainer import CompressedModelTrainer
from hf_mcsmoe.distillation.expert_outputs import SCALE_ROWS
from hf_mcsmoe.distillation.fingerprints import weights_fingerprint
from hf_mcsmoe.distillation.loss import TERMS, DistillationLoss, Divisors, TaskLoss
from hf_mcsmoe.distillation.resumable_trainer import DECISIVE
from hf_mcsmoe.distillation.teacher import load_teacher
from hf_mcsmoe.distillation.teacher_outputs import (
    ROW,
    STORED,
    CollatorWithOutputs,
    NumberedRows,
    TeacherOutputs,
    store_teacher_outputs,
)
from hf_mcsmoe.distillation.trainable import add_lora, check_trainable, choose_parameters
from hf_mcsmoe.distillation.zeros import KeepZeros, has_zeros
from hf_mcsmoe.evaluation.costs import saved_costs
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.packing import unpacked
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.record import Step, public_name

# What the record tells of the last entry of the log.
LOGGED = (*TERMS, "kept_share")
# What it tells of the options.
RECORDED = (
    *("kd_weight", "kd_temperature", "hidden_weight", "expert_weight", "reference_kd"),
    *("train_parts", "freeze_routers", "lora_rank", "lora_alpha"),
)
# What decides on the result: all of that, and how the teacher's outputs are made.
RESULT = (*RECORDED, "lora_targets", "teacher_dtype", "teacher_top_k")


class DistillationTrainer(CompressedModelTrainer):
    """A `Trainer` that distils a compressed model from its original.

    loss = cross entropy + kd_weight * T^2 * KL(teacher || student) [+ hidden_weight * error of the last hidden
    states] [+ expert_weight * error of the layers of experts], each a mean over the labels or tokens that count, over
    all of an accumulated batch and all processes. A library model's own router losses are left out: routers are frozen
    as a rule.

    An evaluation reports each term as well; with stored teacher outputs it has the task's loss alone, since they are
    of the rows to train on. With train_parts="lora" the model becomes a `PeftModel`: its checkpoints hold the adapters
    alone, to resume from; `save_model` merges them into the weights of a compressed checkpoint.

    TRL has a `DistillationTrainer` too, whose student learns from what it writes itself, of any model; this one takes
    a data set with labels and saves compressed checkpoints. Where both are imported, call this one by its other name,
    `MCSMoEDistillationTrainer`.
    """

    decisive = (*DECISIVE, *RESULT)

    def __init__(
        self, model: PreTrainedModel, *args: Any, teacher: PreTrainedModel | str | Path | None = None, **kwargs: Any
    ) -> None:
        """Take the arguments of the Trainer, and the teacher: a model, a folder or a Hub id.

        It may be left out, and is not kept in memory, where `teacher_outputs` names a folder that is there already.

        Raises:
            ValueError: a student that is not compressed, no teacher or one of another kind, vocabulary or tokenizer,
                an empty training set, stored outputs of another data set, vocabulary or temperature.
        """
        options: Any = kwargs.get("args") or (args[0] if args else None)
        check_trainable(model, options.train_parts)
        outputs = _checked_outputs(options, model, teacher)
        self._loss = DistillationLoss(options, model, None)
        if outputs is None:
            dtype, device_map = options.teacher_dtype, options.teacher_device_map
            loaded = load_teacher(cast(Any, teacher), model, kwargs.get("processing_class"), dtype, device_map)
            self._loss = DistillationLoss(options, model, loaded)
        if options.train_parts == "lora" and has_zeros(model):
            raise ValueError(
                "train_parts='lora' fills the weights that were left out inside experts once adapters are merged: "
                "train 'experts' or 'all', which keeps them zero, or 'routers'."
            )
        if options.train_parts == "lora":
            set_seed(cast(Any, options).seed)  # the Trainer's own comes after, and adapters begin at random
            trained: Any = add_lora(model, options.lora_rank, options.lora_alpha, options.lora_targets)
        else:
            trained = choose_parameters(model, options.train_parts, options.freeze_routers)
        super().__init__(trained, *args, **kwargs)
        if has_zeros(model):
            self.add_callback(KeepZeros())
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process would train on {self.args.n_gpu} GPUs (DataParallel), which the loss is not made for: "
                "start with torchrun or accelerate launch, or let it see one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise ValueError("The training set is empty: pass at least one row.")
        # The loss below divides by the labels of the whole accumulated batch, which Trainer counts for such models.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = self._loss.shifted
        self._terms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._evaluated: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._tokens: dict[str, torch.Tensor] = {}
        self._logged_step = 0
        self._outputs = outputs
        if self.teacher is not None and not getattr(self.teacher, "hf_device_map", None):
            nn.Module.to(self.teacher, self.args.device)
        if options.teacher_outputs is not None:
            self._use_outputs(options.teacher_outputs)

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher; None where its stored outputs are used."""
        return self._loss.teacher

    def _use_outputs(self, folder: str) -> None:
        """Store the teacher's outputs if they are not there yet, and let the teacher go."""
        if self._outputs is None:
            if self.args.world_size > 1:
                raise ValueError(
                    f"teacher_outputs={folder!r} is not there yet: call store_teacher_outputs in one process, before "
                    "several train with it."
                )
            store_teacher_outputs(
                cast(PreTrainedModel, self.teacher),
                self.train_dataset,
                folder,
                data_collator=self._get_collator_with_removed_columns(self.data_collator),
                temperature=self.args.kd_temperature,
                top_k=self.args.teacher_top_k,
                batch_size=self.args.per_device_train_batch_size,
            )
            self._outputs = TeacherOutputs(folder)
        self._outputs.check(self.train_dataset, self.student, self.args.kd_temperature)
        self._loss.teacher = None

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches, with what is stored of the teacher where that is used."""
        if self._outputs is None:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        self.train_dataset = NumberedRows(dataset)
        self.data_collator = CollatorWithOutputs(collator, self._outputs, self._loss.shifted)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        if ROW not in columns:
            columns.append(ROW)

    def get_batch_samples(
        self, epoch_iterator: Iterator, *args: Any, **kwargs: Any
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches to accumulate, packed rows apart, and count their tokens for the expert loss."""
        batches, labels = super().get_batch_samples(map(self._apart, epoch_iterator), *args, **kwargs)
        if self._loss.experts is not None:
            counts = self._loss.experts.count_tokens(batches)
            self._tokens = {side: count.to(self.args.device) for side, count in counts.items()}
            if self.args.average_tokens_across_devices:  # a mean over the processes, as of their gradients
                self._tokens = {
                    side: self.accelerator.reduce(count.float(), "mean") for side, count in self._tokens.items()
                }
        return batches, labels

    def _apart(self, batch: Batch) -> dict[str, Any]:
        return dict(unpacked(batch, encoder_decoder=self._loss.encoder_decoder))

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Return a batch where the model is, with packed rows beside each other: not every family keeps them apart."""
        return super()._prepare_inputs(self._apart(inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the student's outputs where asked for.

        Raises:
            ValueError: inputs without labels, none that counts in the whole batch, or nothing of the teacher.
        """
        if lacking := [name for name in self._loss.needed() if inputs.get(name) is None]:
            raise ValueError(f"Distillation needs {' and '.join(lacking)}; the batch has {', '.join(inputs)}.")
        if model.training and self.teacher is None and STORED[0] not in inputs:
            raise ValueError("The batch brings no stored teacher outputs: take it from get_train_dataloader().")
        self._measure_experts(inputs)
        divisors = self._divisors(inputs, num_items_in_batch, model.training)
        terms, outputs = self._loss(model, self.student, inputs, divisors, self._task_loss(num_items_in_batch))
        rows = 1 if model.training else len(inputs[self._loss.needed()[0]])
        sums = self._terms if model.training else self._evaluated
        for name, value in terms.items():
            sums[name] += value.detach() * rows
        if not model.training:
            sums["rows"] += rows
        loss = self._loss.total(terms)
        return (loss, outputs) if return_outputs else loss

    def _task_loss(self, num_items: torch.Tensor | int | None) -> TaskLoss | None:
        """Return `compute_loss_func`, called as a Trainer does, or None where the model's own loss counts."""
        function: Any = self.compute_loss_func
        if function is None:
            return None
        averaged = num_items is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if averaged else 1
        return lambda outputs, labels: function(outputs, labels, num_items_in_batch=num_items) * scale

    def _divisors(self, inputs: Batch, num_items: torch.Tensor | int | None, training: bool) -> Divisors:
        total = self._loss.count(self.student, inputs) if num_items is None else torch.as_tensor(num_items)
        if not total and training:
            raise ValueError("No label of the batch counts (all are -100): the loss would be empty. Check the data.")
        tokens = {}
        if self._loss.experts is not None:
            accumulated = training and num_items is not None and self._tokens
            tokens = self._tokens if accumulated else self._loss.experts.count_tokens([inputs])
        if num_items is not None and self.args.average_tokens_across_devices:
            # Counted over all processes, over which gradients, or losses, are averaged afterwards.
            total = total / self.accelerator.num_processes
        # Known within `train` only, and needed by the form that is no mean over labels.
        batches = self.current_gradient_accumulation_steps if training and self.args.reference_kd else 1
        if num_items is None and training and self.compute_loss_func is not None:
            # Then the Trainer leaves it to us to divide by the batches that are accumulated.
            total = total * self.current_gradient_accumulation_steps
        return Divisors(total, tokens, batches)

    def _measure_experts(self, batch: Batch | None = None) -> None:
        """Measure the scales of the teacher's layers on the first rows to train on, in every process the same.

        Where there are none, as in an evaluation alone, on a batch.
        """
        if self._loss.experts is None or self._loss.experts.scales:
            return
        if self.train_dataset is None:
            self._loss.experts.measure([] if batch is None else [batch])
            return
        dataset, size = cast(Any, self.train_dataset), self.args.per_device_train_batch_size
        collator = self._get_collator_with_removed_columns(self.data_collator)
        sized = isinstance(dataset, Sized)
        chosen = (dataset[row] for row in range(min(SCALE_ROWS, len(dataset)))) if sized else iter(dataset)
        rows = list(islice(chosen, SCALE_ROWS))
        batches = (collator(rows[first : first + size]) for first in range(0, len(rows), size))
        self._loss.experts.measure(self._prepare_inputs(batch) for batch in batches)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log each term of the loss, a mean over the steps since the last time, and the kept share of rows of S."""
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps and self._terms:
            for name, value in self._terms.items():
                logs[name] = float(self.accelerator.gather(value).mean()) / steps
            self._terms.clear()
            self._logged_step = self.state.global_step
            parts = sparse_parts(self.student).values()
            if parts:
                kept, rows = sum(int(part.kept.sum()) for part in parts), sum(part.kept.numel() for part in parts)
                logs["kept_share"] = kept / rows
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, and report each term of the loss, a mean over the rows."""
        self._evaluated.clear()
        result = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = {name: float(self.accelerator.reduce(value)) for name, value in self._evaluated.items()}
        rows = sums.pop("rows", 0)
        terms = {f"{metric_key_prefix}_{name}": value / rows for name, value in sums.items()}
        return result._replace(metrics={**(result.metrics or {}), **terms})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step; see `CompressedModelTrainer`."""
        if not self._terms:  # the first step since the last log, or after a resume
            self._logged_step = self.state.global_step
        return super().training_step(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and let the student's record say how; see `CompressedModelTrainer`."""
        self._terms.clear()
        self._measure_experts()
        result = super().train(*args, **kwargs)
        self._write_record()
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write, and push, a checkpoint whose record says how far the training is; see `CompressedModelTrainer`."""
        self._write_record()
        super()._save_checkpoint(*args, **kwargs)

    def run_identity(self) -> dict[str, Any]:
        """Return what makes another run where it differs: the teacher, or what is stored of it, as well."""
        identity = super().run_identity()
        if self._outputs is not None:
            identity["teacher"] = json.dumps(self._outputs.description, sort_keys=True)
        elif self.teacher is not None:
            identity["teacher"] = weights_fingerprint(self.teacher.named_parameters())
        return identity

    def _write_record(self) -> None:
        if self.is_compressed:
            record = record_of(self.student).with_step(self._step())
            attach_record(self.student, record.with_present_costs(saved_costs(self.student)))

    def _step(self) -> Step:
        """Return what the record tells of the training so far."""
        history = [entry for entry in self.state.log_history if "task_loss" in entry]
        last = {name: value for name, value in (history[-1] if history else {}).items() if name in LOGGED}
        frozen = self.args.freeze_routers and self.args.train_parts != "routers"
        name = cast(Any, self.teacher).name_or_path if self._outputs is None else self._outputs.description["teacher"]
        teacher, lora = public_name(name) or "the original model", self.args.train_parts == "lora"
        parts = (
            f"adapters of rank {self.args.lora_rank} (LoRA), merged into the weights"
            if lora
            else self.args.train_parts
        )
        losses = ", ".join(f"{name} {value:.4f}" for name, value in last.items()) or "not logged"
        lines = [
            f"Trained for {self.state.global_step} steps on the task's loss and `{self.args.kd_weight} x T^2 x KL` "
            f"from {teacher} at temperature T = {self.args.kd_temperature}",
            f"(trained: {parts}; routers {'frozen' if frozen else 'trained'}). Last losses: {losses}.",
        ]
        given = self.args.to_dict()
        options = {name: given[name] for name in RECORDED} | {
            "teacher": teacher,
            "steps": self.state.global_step,
            "losses": last,
        }
        return Step("Distillation", options, lines)


MCSMoEDistillationTrainer = DistillationTrainer


def _checked_outputs(options: Any, model: PreTrainedModel, teacher: Any) -> TeacherOutputs | None:
    """Check what a trainer is given; returns the teacher's outputs where they were stored before."""
    if not isinstance(options, DistillationOptions):
        raise TypeError(f"args must be DistillationArguments or DistillationSeq2SeqArguments, not {options!r}.")
    if not compression(model) and not options.allow_uncompressed:
        raise ValueError(
            f"{type(model).__name__} is not compressed: merge its experts first, or set allow_uncompressed."
        )
    if teacher is model:
        raise ValueError("The teacher is the student itself, and would be trained: pass the original model.")
    folder = options.teacher_outputs
    outputs = TeacherOutputs(folder) if folder is not None and Path(folder).exists() else None
    if outputs is None and teacher is None:
        raise ValueError("A distillation needs a teacher, or teacher_outputs that were stored before.")
    if outputs is not None:
        outputs.check_teacher(teacher)
    return outputs


class DistillationSeq2SeqTrainer(DistillationTrainer, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that distils a compressed encoder-decoder from its original."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Evaluate a batch; where it is generated from, its loss is that of the training as well, not the model's."""
        loss, predictions, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if self.args.predict_with_generate and not prediction_loss_only and "labels" in inputs:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        return loss, predictions, labels
