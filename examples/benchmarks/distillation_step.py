"""Time of a step that learns from a teacher, as a ratio to a plain step and the teacher's forward; cost of pruning.

A Switch student of 8 merged experts a layer and its teacher of 32, on batches of 8 x 128 tokens on each side, over a
vocabulary of 32,128. A step is forward and backward, as the trainers do it, without the optimiser, which is the same
on both sides. The two hooks of the pruning callback are timed by themselves, as a share of a whole step of the
decomposed student with its optimiser: they cost too little to be seen in a ratio of two steps.

python examples/benchmarks/distillation_step.py
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import CLOCKS, Row, compare, parser, print_table, seconds, switch, text
from merged_forward import merge
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_mcsmoe import (
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    LoSparseConfig,
    SparsificationCallback,
    decompose_experts,
)

STEP_AIM, PRUNING_AIM = 1.05, 2.0
Batch = dict[str, torch.Tensor]


def main() -> None:
    """Print a table with a row per measure."""
    options = parser(__doc__, repetitions=5)
    options.add_argument("--layers", type=int, default=2, help="layers of a model's side (default %(default)s)")
    options.add_argument("--d-model", type=int, default=512, help="width D; F is four times it (default %(default)s)")
    options.add_argument("--experts", type=int, default=32, help="of a teacher's layer (default %(default)s)")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=128, help="tokens on each side (default %(default)s)")
    options.add_argument("--padding", type=float, default=0.0, help="share of the labels that do not count")
    print_table(measure(options.parse_args()))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratio of the steps and the share of the callback."""
    torch.set_num_threads(arguments.threads)
    width = arguments.d_model
    teacher = switch(arguments.layers, arguments.experts, width, 4 * width, arguments.dtype)
    student = merge(teacher, experts=arguments.experts // 4)
    with tempfile.TemporaryDirectory() as folder:
        return [
            _distillation(student, teacher, folder, arguments),
            _pruning(student, teacher, folder, arguments),
        ]


def _batch(model: PreTrainedModel, arguments: argparse.Namespace) -> Batch:
    """Return a batch as a collator makes it."""
    batch = text(model, 1, arguments.batch_size, arguments.length)[0]
    labels = batch["decoder_input_ids"].roll(-1, 1)
    labels[:, round(arguments.length * (1 - arguments.padding)) :] = -100
    return {**batch, "labels": labels}


def _options(folder: str, **more: Any) -> dict[str, Any]:
    return {"output_dir": folder, "report_to": "none", "use_cpu": True, **more}


def _step(trainer: Seq2SeqTrainer, batch: Batch) -> Callable[[], object]:
    """Return a trainer's own step: forward, loss and backward."""
    trainer.create_optimizer()
    count = (batch["labels"] != -100).sum()

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch), count)
        trainer.model.zero_grad()

    return step


def _distiller(student: PreTrainedModel, teacher: PreTrainedModel, folder: str) -> DistillationSeq2SeqTrainer:
    return DistillationSeq2SeqTrainer(
        student, teacher=teacher, args=DistillationSeq2SeqArguments(**_options(folder, logging_strategy="no"))
    )


def _distillation(
    student: PreTrainedModel, teacher: PreTrainedModel, folder: str, arguments: argparse.Namespace
) -> Row:
    batch = _batch(student, arguments)
    # The plain trainer trains what the other one does: all but the routers, which that one has frozen.
    distil = _step(_distiller(student, teacher, folder), batch)
    plain = _step(Seq2SeqTrainer(student, args=Seq2SeqTrainingArguments(**_options(folder))), batch)

    def reference() -> None:
        plain()
        with torch.no_grad():
            teacher(**batch)

    return compare("distillation step / plain step + teacher forward", distil, reference, arguments, STEP_AIM)


def _pruning(student: PreTrainedModel, teacher: PreTrainedModel, folder: str, arguments: argparse.Namespace) -> Row:
    """Time both hooks in the middle of the schedule, where every step prunes."""
    model = decompose_experts(
        copy.deepcopy(student),
        # Any factors serve to measure the time.
        LoSparseConfig(rank=32, factorisation=lambda weight, rank, *_: (weight[:, :rank], weight[:rank])),
    )
    trainer, batch, callback = _distiller(model, teacher, folder), _batch(model, arguments), SparsificationCallback()
    trainer.create_optimizer()
    count, clock, state = (batch["labels"] != -100).sum(), CLOCKS[arguments.clock], TrainerState(max_steps=10_000)
    hooks = (callback.on_pre_optimizer_step, callback.on_optimizer_step)
    shares = []
    for repetition in range(arguments.repetitions + 1):
        state.global_step = 2000 + repetition
        step = seconds(lambda: trainer.training_step(model, dict(batch), count), clock)
        before = seconds(lambda: hooks[0](trainer.args, state, TrainerControl(), model=model), clock)
        step += seconds(trainer.optimizer.step, clock)
        after = seconds(lambda: hooks[1](trainer.args, state, TrainerControl(), model=model), clock)
        model.zero_grad()
        shares.append(100 * (before + after) / step)
    low, middle, high = statistics.quantiles(shares[1:], n=4) if len(shares) > 2 else shares[1:] * 3
    return Row("pruning callback, % of a distillation step", middle, PRUNING_AIM, (low, high))


if __name__ == "__main__":
    main()
