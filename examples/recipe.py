"""What the scripts of the recipe share: their arguments, the paper's defaults, data, and the last evaluation."""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    set_seed,
)

from hf_mcsmoe.data.features import Feature, pair_features
from hf_mcsmoe.data.tasks import TASKS, Example, Task, get_task, task_rows
from hf_mcsmoe.data.text import Sample
from hf_mcsmoe.distillation.checkpoints import last_checkpoint, written_last
from hf_mcsmoe.evaluation.quality import check_labels, predict, score
from hf_mcsmoe.layers.find import moe_layers
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

# The paper's optimiser (appendix on training): the same for all tasks.
PAPER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.01,
    "warmup_steps": 16,
    "lr_scheduler_type": "linear",
}
# Of Transformers' own arguments, what the scripts choose otherwise: no reports, one checkpoint an epoch, two kept, and
# processes that do not wait for the gradient of an expert that no token of theirs chose.
HOUSE = {
    "report_to": "none",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "output_dir": "out",
    "ddp_find_unused_parameters": True,
}


@dataclass
class TaskArguments:
    """The task and its rows."""

    model_name_or_path: str = field(metadata={"help": "model to start from: a folder or Hub id"})
    task: str = field(metadata={"help": f"one of {', '.join(TASKS)}"})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder laid out like the Hub, <organisation>/<name>; by default the Hub itself"},
    )
    train_file: str | None = field(default=None, metadata={"help": "train on the rows of this JSON Lines file"})
    evaluation_file: str | None = field(
        default=None, metadata={"help": "evaluate on the rows of this JSON Lines file"}
    )
    train_split: str | None = field(default=None, metadata={"help": "split to train on, if not the task's"})
    evaluation_split: str | None = field(default=None, metadata={"help": "split to evaluate on, if not the task's"})
    max_train_rows: int | None = field(default=None, metadata={"help": "train on a random part of the rows"})
    max_evaluation_rows: int | None = field(default=None, metadata={"help": "evaluate on a random part of the rows"})
    holdout: float = field(
        default=0.0,
        metadata={"help": "share of the training rows kept apart, for --eval_strategy and --load_best_model_at_end"},
    )
    max_source_length: int | None = field(default=None, metadata={"help": "in tokens; by default the task's"})
    max_target_length: int | None = field(default=None, metadata={"help": "in tokens; by default the task's"})
    by: str = field(default="generation", metadata={"help": "how to evaluate: generation or likelihood"})


@dataclass
class MergeArguments:
    """How experts are merged (paper, section 3.1)."""

    num_groups: int = field(default=8, metadata={"help": "experts that a layer keeps, on average over merged layers"})
    num_experts: int | None = field(default=None, metadata={"help": "experts of a layer before; checked if given"})
    skip: list[str] = field(
        default_factory=lambda: ["encoder.block.1.*"],
        metadata={"help": "layers to leave whole: patterns of names, or none; the paper's: the first sparse one"},
    )
    num_samples: int = field(default=256, metadata={"help": "training rows that guide the merge"})
    merge_batch_size: int = field(default=16, metadata={"help": "rows in a forward of the calibration"})
    budget: str = field(default="adaptive", metadata={"help": "how layers share the experts: adaptive or uniform"})
    similarity: str = field(default="router_logits", metadata={"help": "which experts belong together"})
    alignment: str = field(default="weight_matching", metadata={"help": "how neurons are aligned, or none"})
    weighting: str = field(default="saliency", metadata={"help": "saliency, uniform, or dominant, which prunes"})
    repair: str = field(
        default="none",
        metadata={"help": "fit merged layers to the original before training: none (paper), refit, local"},
    )


@dataclass
class Data:
    """What a script trains and evaluates on."""

    task: Task
    train: list[Example]
    holdout: list[Example]
    evaluation: list[Example]


def parse(classes: Sequence[type], description: str, arguments: Sequence[str] | None = None, **defaults: Any) -> Any:
    """Parse a command line into one object per class; what is not given is the paper's for the task, then `defaults`.

    Raises:
        ValueError: an unknown task.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    name = first.parse_known_args(given)[0].task
    parser = HfArgumentParser(
        list(classes), description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    settings = {}
    if name is not None:
        task = get_task(name)
        settings = {"learning_rate": task.learning_rate, "per_device_train_batch_size": task.batch_size}
    known = {action.dest for action in parser._actions}
    chosen = {**PAPER, **HOUSE, **settings, **defaults}
    parser.set_defaults(**{key: value for key, value in chosen.items() if key in known})
    return parser.parse_args_into_dataclasses(given)


@contextlib.contextmanager
def mistakes_told_once() -> Iterator[None]:
    """End the script with one sentence, told by the first process, where the block finds a mistake of the user's.

    For what each process, or the first one alone, does before training; an error that only another one meets has to be
    told by that one.
    """
    try:
        yield
    except ValueError as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)


def check_processes() -> None:
    """Raise ValueError where a launcher has started several processes and each of them would work alone."""
    started, known = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if known != started:
        raise ValueError(
            f"{started} processes were started, but there is no accelerator for which they could work together: pass "
            "--use_cpu true."
        )


def load(arguments: TaskArguments, training: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Data]:
    """Return the model, its tokenizer and the data, in the order in which mistakes are cheapest.

    Raises:
        ValueError: no such model, task, split or file, or arguments that contradict each other.
    """
    check_processes()
    set_seed(training.seed)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    data = load_data(arguments, training.seed)
    check_labels(tokenizer, data.task)
    if training.eval_strategy != "no" and not data.holdout:
        raise ValueError(
            f"--eval_strategy {training.eval_strategy.value} needs rows to choose by: pass --holdout 0.05. The split "
            "for evaluation is used once, at the end."
        )
    return load_model(arguments.model_name_or_path), tokenizer, data


def load_data(arguments: TaskArguments, seed: int, *, train: bool = True) -> Data:
    """Return the examples of the task; `holdout` keeps examples of one question or passage on one side."""
    task = get_task(arguments.task)
    if not 0 <= arguments.holdout < 1:
        raise ValueError(f"--holdout {arguments.holdout} must be a share in [0, 1).")
    rng = random.Random(seed)
    examples: list[Example] = []
    if train:
        source = arguments.train_file or arguments.data_dir
        examples = task.examples(task_rows(task, arguments.train_split or task.train_split, data_dir=source))
        rng.shuffle(examples)
        examples = examples[: arguments.max_train_rows]
    groups = list(dict.fromkeys(item.group or str(number) for number, item in enumerate(examples)))
    apart = set(groups[: math.ceil(arguments.holdout * len(groups))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for number, item in enumerate(examples):
        sides[(item.group or str(number)) in apart].append(item)
    rows = task_rows(task, arguments.evaluation_split, data_dir=arguments.evaluation_file or arguments.data_dir)
    if arguments.max_evaluation_rows is not None and arguments.max_evaluation_rows < len(rows):
        rows = random.Random(0).sample(rows, arguments.max_evaluation_rows)
    return Data(task, sides[0], sides[1], task.examples(rows))


def features(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, arguments: TaskArguments
) -> list[Feature]:
    """Return the examples as tokens, for a Trainer."""
    source_length = arguments.max_source_length or task.max_source_length
    target_length = arguments.max_target_length or task.max_target_length
    return pair_features(
        [(item.source, item.targets[0]) for item in examples], tokenizer, source_length, target_length
    )


def trainer_data(
    data: Data, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: TaskArguments
) -> dict[str, Any]:
    """Return what a Trainer is given beside the model and its arguments."""
    return {
        "train_dataset": features(data.train, tokenizer, data.task, arguments),
        "eval_dataset": features(data.holdout, tokenizer, data.task, arguments) or None,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, model=model),
        "processing_class": tokenizer,
    }


def calibration_samples(data: Data) -> list[Sample]:
    """Return the training examples as `hf_mcsmoe.data.calibration_batches` takes them."""
    return [(item.source, item.targets[0]) for item in data.train]


def check_num_experts(model: PreTrainedModel, expected: int | None) -> None:
    """Raise ValueError where a layer has another number of experts than the user believes."""
    for layer in moe_layers(model):
        if expected is not None and layer.num_experts != expected:
            raise ValueError(f"--num_experts {expected}, but {layer.name} has {layer.num_experts}.")


def leave() -> None:
    """Leave the other processes, at the end of a script.

    The threads of gloo drop the tensors of the last exchange, for which they need the interpreter: one that ends just
    then aborts (pytorch/pytorch#179291). DistributedDataParallel keeps these threads alive whatever is destroyed, so
    they are given the time.
    """
    state = PartialState()
    if state.num_processes > 1:
        time.sleep(0.5)
    state.destroy_process_group()


def made_once(make: Callable[[], PreTrainedModel], output_dir: str) -> PreTrainedModel:
    """Return the model that `make` makes: of several processes the first one makes it, the others load what it saved.

    So all of them hold the same groups of experts, whatever a device does to the last digit of a statistic, and only
    one needs the memory and, where they share the cores, the time. `output_dir` has to be seen by all of them.
    """
    state, folder = PartialState(), Path(output_dir) / "made_once"
    if state.num_processes == 1:
        return make()
    model = None
    if state.is_main_process:
        model = make()
        model.save_pretrained(folder)
    state.wait_for_everyone()
    model = model or load_model(str(folder))
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder)
    return model


def train(trainer: Seq2SeqTrainer) -> None:
    """Train, from where a killed run stopped with `--resume_from_checkpoint last` (or a folder)."""
    resume = trainer.args.resume_from_checkpoint
    if resume == "last":
        last = last_checkpoint(Path(trainer.args.output_dir), written_last(trainer.callback_handler.callbacks))
        resume = None if last is None else str(last)
    trainer.train(resume_from_checkpoint=resume)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    arguments: TaskArguments,
    batch_size: int,
    output_dir: str,
    name: str = "evaluation",
) -> dict[str, float]:
    """Evaluate on the rows for evaluation, each process on its part; prints and writes `<name>.json`."""
    state = PartialState()
    model.to(state.device)
    indices = list(range(len(data.evaluation)))[state.process_index :: state.num_processes]
    part = [data.evaluation[index] for index in indices]
    options = {
        "batch_size": batch_size,
        "by": arguments.by,
        "max_source_length": arguments.max_source_length,
        "max_target_length": arguments.max_target_length,
    }
    answers = predict(model, tokenizer, data.task, part, **options)
    pairs = list(zip(indices, answers, strict=True))
    gathered = dict(gather_object(pairs) if state.num_processes > 1 else pairs)
    figures = score(data.task, [gathered[index] for index in range(len(data.evaluation))], data.evaluation)
    if state.is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)
    return figures
