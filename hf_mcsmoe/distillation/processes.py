"""Scripts that a launcher starts in several processes: one model, one message, one evaluation among them."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.data.tasks import Example, Task
from hf_mcsmoe.evaluation.quality import predict, score
from hf_mcsmoe.files import write_json
from hf_mcsmoe.layers.loading import load_model


@contextlib.contextmanager
def mistakes_reported_once() -> Iterator[None]:
    """End the script with one sentence, printed by the first process, where the block raises a ValueError.

    For what each process, or the first one alone, does before training; an error that only another one meets has to be
    reported by that one.
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


def made_by_first_process(make: Callable[[], PreTrainedModel], folder: str) -> PreTrainedModel:
    """Return the model that `make` makes: of several processes the first one makes it, the others load what it saved.

    So all of them hold the same groups of experts, whatever a device does to the last digit of a statistic, and only
    one needs the memory and, where they share the cores, the time. `folder` has to be seen by all of them; it is
    removed afterwards.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    model = None
    if state.is_main_process:
        model = make()
        model.save_pretrained(folder)
    state.wait_for_everyone()
    model = model or load_model(folder)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder)
    return model


def evaluate_in_processes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    file: Path,
    **options: Any,
) -> dict[str, float]:
    """Return the metrics of a task, each process answering a part of the examples; the first writes and prints them.

    Args:
        file: where the metrics are written, in JSON.
        options: those of `predict`.
    """
    state = PartialState()
    model.to(state.device)
    indices = list(range(len(examples)))[state.process_index :: state.num_processes]
    answers = predict(model, tokenizer, task, [examples[index] for index in indices], **options)
    pairs = list(zip(indices, answers, strict=True))
    gathered = dict(gather_object(pairs) if state.num_processes > 1 else pairs)
    figures = score(task, [gathered[index] for index in range(len(examples))], examples)
    if state.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, figures)
        print(f"{file.stem}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)
    return figures


def shut_down_processes() -> None:
    """Leave the group of processes, at the end of a script.

    The threads of gloo drop the tensors of the last exchange, for which they need the interpreter: one that ends just
    then aborts (pytorch/pytorch#179291). DistributedDataParallel keeps these threads alive whatever is destroyed, so
    they are given the time.
    """
    state = PartialState()
    if state.num_processes > 1:
        time.sleep(0.5)
    state.destroy_process_group()
