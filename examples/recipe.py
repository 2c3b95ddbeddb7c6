"""What the scripts of the recipe share: the arguments of a task, the paper's settings, the data, the evaluation."""

import argparse
import random
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, set_seed

from hf_mcsmoe.data.calibration import calibration_batches
from hf_mcsmoe.data.features import collator, pair_features
from hf_mcsmoe.data.tasks import TASKS, Example, Task, get_task, hold_out, task_rows
from hf_mcsmoe.distillation.processes import check_processes, evaluate_in_processes
from hf_mcsmoe.evaluation.quality import check_labels
from hf_mcsmoe.layers.find import moe_layers
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.config import option

# The paper's optimiser; and processes do not wait for the gradient of an expert that no token of theirs chose.
DEFAULTS: dict[str, Any] = {"output_dir": "out", "ddp_find_unused_parameters": True, "report_to": "none"}
DEFAULTS |= {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6, "weight_decay": 0.01, "warmup_steps": 16}
DEFAULTS |= {"lr_scheduler_type": "linear", "save_strategy": "epoch", "save_total_limit": 2}


@dataclass
class TaskArguments:
    """The task and its rows."""

    model_name_or_path: str = option(MISSING, "model to start from: a folder or Hub id")
    task: str = option(MISSING, f"one of {', '.join(TASKS)}")
    data_dir: str | None = option(None, "folder laid out like the Hub, <organisation>/<name>; by default the Hub")
    train_file: str | None = option(None, "train on the rows of this JSON Lines file")
    evaluation_file: str | None = option(None, "evaluate on the rows of this JSON Lines file")
    train_split: str | None = option(None, "split to train on, if not the task's")
    evaluation_split: str | None = option(None, "split to evaluate on, if not the task's")
    max_train_rows: int | None = option(None, "train on a random part of the rows")
    max_evaluation_rows: int | None = option(None, "evaluate on a random part of the rows")
    holdout: float = option(0.0, "share of the training rows kept apart, for --eval_strategy")
    max_source_length: int | None = option(None, "in tokens; by default the task's")
    max_target_length: int | None = option(None, "in tokens; by default the task's")
    by: str = option("generation", "how to evaluate: generation or likelihood")


@dataclass
class Data:
    """What a script trains and evaluates on."""

    arguments: TaskArguments
    task: Task
    train: list[Example]
    holdout: list[Example]
    evaluation: list[Example]


def parse(classes: list[type], description: str, arguments: list[str] | None = None) -> Any:
    """Parse a command line into one object per class; what is not given is the paper's for the task."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    parser = HfArgumentParser(classes, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    chosen = dict(DEFAULTS)
    if (name := first.parse_known_args(arguments)[0].task) is not None:
        rate, size = get_task(name).learning_rate, get_task(name).batch_size
        chosen |= {"learning_rate": rate, "per_device_train_batch_size": size}
    known = chosen.keys() & {action.dest for action in parser._actions}
    parser.set_defaults(**{key: chosen[key] for key in known})
    return parser.parse_args_into_dataclasses(arguments)


def load(arguments: TaskArguments, training: Any, num_experts: int | None = None) -> tuple[Any, Any, Data]:
    """Return the model, with so many experts a layer, its tokenizer and the data: cheapest mistakes first."""
    check_processes()
    set_seed(training.seed)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    data = load_data(arguments, training.seed)
    check_labels(tokenizer, data.task)
    if training.eval_strategy != "no" and not data.holdout:
        raise ValueError("--eval_strategy needs rows to choose a checkpoint by: pass --holdout 0.05.")
    model = load_model(arguments.model_name_or_path)
    for layer in moe_layers(model):
        if num_experts not in (None, layer.num_experts):
            raise ValueError(f"--num_experts {num_experts}, but {layer.name} has {layer.num_experts}.")
    return model, tokenizer, data


def load_data(arguments: TaskArguments, seed: int, *, train: bool = True) -> Data:
    """Return the examples of the task, those to train on in an order by the seed; lengths not given are the task's."""
    task, source = get_task(arguments.task), arguments.train_file or arguments.data_dir
    rows = task_rows(task, arguments.train_split or task.train_split, data_dir=source) if train else []
    examples = task.examples(rows)
    random.Random(seed).shuffle(examples)
    rows = task_rows(task, arguments.evaluation_split, data_dir=arguments.evaluation_file or arguments.data_dir)
    if arguments.max_evaluation_rows is not None and arguments.max_evaluation_rows < len(rows):
        rows = random.Random(0).sample(rows, arguments.max_evaluation_rows)
    arguments.max_source_length = arguments.max_source_length or task.max_source_length
    arguments.max_target_length = arguments.max_target_length or task.max_target_length
    sides = hold_out(examples[: arguments.max_train_rows], arguments.holdout)
    return Data(arguments, task, *sides, task.examples(rows))


def calibration(data: Data, model: Any, tokenizer: Any, **sampling: int) -> list[Any]:
    """Return batches of training rows that guide a merge; `sampling` as for `calibration_batches`."""
    sampling["max_length"] = data.arguments.max_source_length
    return calibration_batches([item.pair for item in data.train], tokenizer, model, **sampling)


def trainer_data(data: Data, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what a Trainer is given beside the model and its arguments."""
    lengths = data.arguments.max_source_length, data.arguments.max_target_length
    parts = ([item.pair for item in part] for part in (data.train, data.holdout))
    train, holdout = (pair_features(pairs, tokenizer, *lengths) or None for pairs in parts)
    more = {"data_collator": collator(tokenizer, model), "processing_class": tokenizer}
    return {"train_dataset": train, "eval_dataset": holdout, **more}


def evaluate(data: Data, model: Any, tokenizer: Any, training: Any, name: str = "evaluation") -> None:
    """Evaluate on the rows for evaluation; print the figures and write `<name>.json`."""
    options = {key: vars(data.arguments)[key] for key in ("by", "max_source_length", "max_target_length")}
    options |= {"batch_size": training.per_device_eval_batch_size, "file": Path(training.output_dir) / f"{name}.json"}
    evaluate_in_processes(model, tokenizer, data.task, data.evaluation, **options)
