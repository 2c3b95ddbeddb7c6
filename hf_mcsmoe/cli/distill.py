"""`hf-mcsmoe distill`."""

import random
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from peft import PeftModel
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.cli.display import console, cost_table, notes, stage_bars
from hf_mcsmoe.cli.fewer import Fewer, as_student, check_together
from hf_mcsmoe.cli.options import Output, Storage, Tokenizer, check_device_map, described, itemsize, options_of
from hf_mcsmoe.cli.recipe import recipe_text
from hf_mcsmoe.cli.report import draw
from hf_mcsmoe.cli.sources import Source
from hf_mcsmoe.cli.training import (
    Training,
    check_working_folder,
    kept_until_complete,
    training_folder,
    training_progress,
)
from hf_mcsmoe.data.features import Feature, collator, feature_batches
from hf_mcsmoe.data.text import check_token_ids
from hf_mcsmoe.distillation import (
    DistillationArguments,
    DistillationOptions,
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    DistillationTrainer,
)
from hf_mcsmoe.distillation.checkpoints import check_run
from hf_mcsmoe.distillation.expert_pruning import ExpertPruningCallback
from hf_mcsmoe.distillation.fingerprints import sample_fingerprint
from hf_mcsmoe.distillation.teacher import check_kind, check_tokenizer, check_vocabulary, vocabulary_size
from hf_mcsmoe.distillation.trainable import check_trainable
from hf_mcsmoe.evaluation.costs import REPETITIONS, account, folder_bytes, saved_costs
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_model, load_tokenizer
from hf_mcsmoe.layers.output import check_output
from hf_mcsmoe.low_rank.config import KEEP, LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact, decompose_experts
from hf_mcsmoe.low_rank.pruning import SparsificationCallback
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.config import option_help
from hf_mcsmoe.methods.registry import method_name
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.losparse_mcsmoe import low_rank_modules, sparse_parts
from hf_mcsmoe.planning import check_request
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.record import LOW_RANK, Costs, Step

# Fields of DistillationOptions that are options of the command; a new one needs its name here, and no more.
DISTILLATION = [
    "kd_weight",
    "kd_temperature",
    "hidden_weight",
    "expert_weight",
    "reference_kd",
    "train_parts",
    "freeze_routers",
    "lora_rank",
    "lora_alpha",
    "teacher_dtype",
    "teacher_device_map",
]
# Training rows by whose inputs experts are decomposed, and on which costs are counted.
SAMPLE = 256


@dataclass(frozen=True)
class Pruning(Storage):
    """How experts are stored as low rank + sparse while they learn."""

    factorisation: str = described("weighted_svd", option_help("factorisation", LoSparseConfig))
    start: float = described(0.04, "share of the steps before the first row of S, or expert, is pruned")
    end: float = described(0.16, "share of the steps after the last one was")
    importance: str = described("sensitivity", "score of a row of S: sensitivity or magnitude")

    def check(self, name: str, student: PreTrainedModel, *, scheduled: bool = False) -> LoSparseConfig | None:
        """Return how the experts of a student, without weights, are to be decomposed; None where they are not.

        Args:
            scheduled: whether start and end are of another schedule.

        Raises:
            ValueError: it is decomposed already, the rank does not fit, or options that do nothing without one.
        """
        if self.rank is None:
            self._check_without_rank(name, student, {"start", "end"} if scheduled else set())
            return None
        if any(low_rank_modules(student)):
            raise ValueError(f"{name} is decomposed already: leave out --rank, or name the merged model.")
        config = cast(LoSparseConfig, self.low_rank(factorisation=self.factorisation))
        whole = student.config.mcsmoe.get("whole", [])
        layers = Layers.of(student)
        check_low_rank(layers.only([layer for layer in layers if layer.merged or layer.name in whole]), config)
        return config

    def _check_without_rank(self, name: str, student: PreTrainedModel, used: set[str]) -> None:
        unused = {"factorisation"} if sparse_parts(student) else {item.name for item in fields(self)} - used
        values = asdict(self)
        given = [
            f"--{item.name} {values[item.name]}"
            for item in fields(self)
            if item.name in unused and values[item.name] != item.default
        ]
        if given:
            raise ValueError(
                f"{' and '.join(given)} would do nothing to {name} without --rank: give --rank as well, or leave out "
                "the others."
            )

    def callback(self, keep: float, steps: int) -> SparsificationCallback:
        """Return what prunes down to `keep` in a training of so many steps.

        Raises:
            ValueError: a number out of range, an unknown name, or a schedule that leaves no step to prune in.
        """
        made = SparsificationCallback(keep, start=self.start, end=self.end, importance=self.importance)
        schedule = made.options(steps)
        if schedule["start"] + schedule["end"] >= steps:
            raise ValueError(
                f"--start {self.start} and --end {self.end} leave none of the {steps} steps of the training to prune "
                "in: train longer, or lower them."
            )
        return made


@dataclass(frozen=True)
class TrainedOutput(Output):
    """Where the result of a training goes, which may be killed on the way."""

    resume: bool = described(False, "go on with a run that was killed, if there is one")


@dataclass(frozen=True)
class Run:
    """A run that was checked: what it trains, by which teacher, on what, and how."""

    student: str
    teacher: str
    tokenizer: PreTrainedTokenizerBase
    features: list[Feature]
    arguments: Any
    low_rank: LoSparseConfig | None
    pruning: SparsificationCallback | None
    fewer: ExpertPruningCallback | None
    dtype: str
    saved_dtype: torch.dtype

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """Some of the training rows, drawn by the seed, in batches of like length."""
        rows = random.Random(self.arguments.seed).sample(self.features, min(SAMPLE, len(self.features)))
        return feature_batches(rows, self.tokenizer, self.arguments.per_device_train_batch_size)


@options_of(TrainedOutput, "target", panel="Output")
@options_of(Source, "source", panel="Data")
@options_of(Training, "training", panel="Training")
@options_of(Fewer, "fewer", panel="Merge")
@options_of(Pruning, "pruning", panel="Storage")
@options_of(DistillationOptions, "distillation", DISTILLATION, panel="Training")
def distill_command(
    student: Annotated[str, typer.Argument(help="folder or Hub id of the merged model", metavar="STUDENT")],
    teacher: Annotated[str, typer.Option(help="folder or Hub id of the original model", rich_help_panel="Training")],
    target: TrainedOutput,
    source: Source,
    training: Training,
    distillation: DistillationOptions,
    pruning: Pruning,
    fewer: Fewer,
    tokenizer: Tokenizer = None,
    dtype: Annotated[
        str, typer.Option(help="dtype to train in; the result is saved in the student's", rich_help_panel="Loading")
    ] = "float32",
    recipe: dict[str, Any] | None = None,
) -> None:
    """Train a merged model on a task or text and on its teacher's outputs; with --rank, compress it further (MC-SMoE).

    Checkpoints lie in the hidden folder .OUTPUT.mcsmoe-work beside the output until the result is complete.
    """
    started = time.perf_counter()
    output = target.claimed(student=student, teacher=teacher, data=source.data, data_dir=source.data_dir)
    folder = training_folder(output)
    parts = [asdict(part) for part in (source, training, pruning, fewer, distillation)]
    asked = {name: str(value) if isinstance(value, Path) else value for part in parts for name, value in part.items()}
    asked |= {"student": student, "teacher": teacher, "tokenizer": tokenizer, "dtype": dtype}
    checkpoint = check_working_folder(folder, asked, resume=target.resume, overwrite=target.overwrite)
    run = _check(student, teacher, source, training, pruning, fewer, distillation, tokenizer, dtype, folder)
    if checkpoint:
        data = sample_fingerprint(run.features, empty_model(student))
        check_run(checkpoint, {"data": data}, {})
    begin = f"resumed from {checkpoint.name}" if checkpoint else "from the beginning"
    notes.print(f"{len(run.features):,} rows, {run.arguments.max_steps:,} steps, {begin}")
    with kept_until_complete(folder, asked, checkpoint):
        model, costs = _train(run, checkpoint)
        attach_record(model, replace(record_of(model), recipe=recipe_text("distill", recipe or {})))
        with stage_bars() as progress, one_step("saving", progress):
            model.save_pretrained(output, tokenizer=run.tokenizer if tokenizer else None)
    draw(output)
    costs["distilled"] = replace(costs["distilled"], bytes_on_disk=folder_bytes(output))
    console.print(cost_table(costs))
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    target.push(model, run.tokenizer if tokenizer else None)


def _check(
    student: str,
    teacher: str,
    source: Source,
    training: Training,
    pruning: Pruning,
    fewer: Fewer,
    distillation: DistillationOptions,
    tokenizer_name: str | None,
    dtype: str,
    folder: Path,
) -> Run:
    """Check all that can be checked before weights are loaded.

    Raises:
        ValueError: any of it is wrong.
    """
    distillation.check()
    check_device_map(distillation.teacher_device_map, "--teacher-device-map")
    check_together(fewer, pruning.rank, distillation)
    ours, theirs = empty_model(student), empty_model(teacher)
    ours = as_student(student, ours, is_original=fewer.preset is not None)
    check_pair(student, ours, theirs)
    check_trainable(ours, distillation.train_parts)
    itemsize(distillation.teacher_dtype, theirs, "--teacher-dtype")
    low_rank = pruning.check(student, ours, scheduled=fewer.preset is not None)
    # The result, and three checkpoints with the two moments of the optimiser: a new one is written before one goes.
    needed = ours.num_parameters() * (ours.dtype.itemsize + 3 * (itemsize(dtype, ours) + 8))
    check_output(folder, overwrite=True, needed_bytes=needed)
    tokenizer = load_tokenizer(tokenizer_name or student)
    check_tokenizer(ours, theirs, tokenizer)
    with stage_bars() as progress:
        contents = source.read(training=True, progress=progress)
        with one_step("tokenising", progress):
            features = contents.features(tokenizer, ours.config, seed=training.seed)
    check_token_ids(max(max(feature["input_ids"]) for feature in features), ours)
    settings = training.arguments(contents.task, len(features), folder)
    kind = DistillationSeq2SeqArguments if ours.config.is_encoder_decoder else DistillationArguments
    arguments = kind(**settings, **vars(distillation))
    going = fewer.callback(pruning.start, pruning.end, settings["max_steps"])
    if going:
        check_request(Layers.of(theirs), going.config)
    callback = None
    if low_rank or sparse_parts(ours):
        if distillation.train_parts in ("lora", "routers"):
            raise ValueError(
                f"--train-parts {distillation.train_parts} leaves S frozen, so nothing tells which of its rows to "
                "prune: leave out --rank, or train all or the experts."
            )
        given = pruning.keep if low_rank is None else low_rank.keep
        keep = ours.config.mcsmoe.get("keep", KEEP) if given is None else given
        callback = pruning.callback(keep, settings["max_steps"])
    return Run(student, teacher, tokenizer, features, arguments, low_rank, callback, going, dtype, ours.dtype)


def check_pair(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where a model is not one that `teacher` can teach; neither needs weights."""
    if not compression(student):
        raise ValueError(f"{name} is not compressed: merge its experts first, with hf-mcsmoe compress.")
    if not type(student).can_generate():
        raise ValueError(f"{name} is a {type(student).__name__}, which writes no text; it cannot be distilled.")
    check_kind(student, teacher)
    check_vocabulary(vocabulary_size(student), vocabulary_size(teacher))


def _train(run: Run, checkpoint: Path | None) -> tuple[PreTrainedModel, dict[str, Costs]]:
    """Load, decompose, train and compact; returns the result and the costs of teacher, student and result."""
    options, batches = run.arguments, run.batches
    batch = batches[len(batches) // 2]  # of middling length
    measure = partial(account, batch=batch, repetitions=REPETITIONS)
    with stage_bars() as progress:
        progress("loading", 0, 2)
        model = as_student(run.student, load_model(run.student, dtype=run.dtype), is_original=run.fewer is not None)
        progress("loading", 1, 2)
        teacher = load_model(run.teacher, dtype=options.teacher_dtype, device_map=options.teacher_device_map)
        progress("loading", 2, 2)
        costs = {}
        named = [("teacher", run.teacher, teacher), ("student", run.student, model)]
        for name, folder, measured in counted(named, "costs", progress):
            costs[name] = replace(measure(measured), bytes_on_disk=folder_bytes(folder))
        if run.low_rank:
            _decompose(model, run.low_rank, batches, checkpoint, progress)
    kind = DistillationSeq2SeqTrainer if model.config.is_encoder_decoder else DistillationTrainer
    with training_progress() as shown:
        callbacks = [*(part for part in (run.pruning, run.fewer) if part), shown]
        trainer = kind(
            model,
            args=options,
            teacher=teacher,
            train_dataset=run.features,
            data_collator=collator(run.tokenizer),
            callbacks=callbacks,
        )
        for own in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(own)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if isinstance(trainer.model, PeftModel):
        model = trainer.model.merge_and_unload()
    if run.pruning:
        compact(model)
    torch.nn.Module.to(model, run.saved_dtype)
    costs["distilled"] = replace(measure(model), bytes_on_disk=saved_costs(model).bytes_on_disk)
    record = record_of(model)
    if run.pruning:
        record = record.with_step(_pruning_step(run.pruning))
    attach_record(model, replace(record, costs=costs))
    return model, costs


def _pruning_step(pruning: SparsificationCallback) -> Step:
    """Return what the record tells of how experts are stored."""
    importance = method_name(pruning.importance)
    lines = [
        f"Each matrix of a merged expert is stored as `U V + S` (MC-SMoE), with the share {pruning.keep} of S (hidden "
        "units):",
        f"those of the highest {importance}, chosen while the model was distilled. No dense matrix is kept or "
        "rebuilt.",
    ]
    return Step(LOW_RANK, {"keep": pruning.keep, "importance": importance}, lines)


def _decompose(
    model: PreTrainedModel,
    config: LoSparseConfig,
    batches: list[dict[str, torch.Tensor]],
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """Decompose the experts; those of a run that goes on get their values from the checkpoint."""
    weighted = config.factorisation != "svd" and checkpoint is None
    chosen = config if weighted else replace(config, factorisation="svd")

    def tell(layer: str, done: int, total: int) -> None:
        progress("low rank", done, total)

    decompose_experts(model, chosen, batches if weighted else None, progress=tell)
