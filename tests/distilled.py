"""Tiny students, their rows of text, and trainers that distil them; shared by the tests of distillation."""

import copy
from pathlib import Path
from typing import Any

import torch
from families import build
from merged import example
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import (
    DistillationArguments,
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    DistillationTrainer,
)

KINDS: dict[str, tuple[Any, Any]] = {
    "mixtral": (DistillationTrainer, DistillationArguments),
    "switch_transformers": (DistillationSeq2SeqTrainer, DistillationSeq2SeqArguments),
}
ROWS, LENGTH = 8, 6
Row = dict[str, torch.Tensor]


def make_rows(padding: int = 0) -> list[Row]:
    """Make rows of text whose labels count at more positions from row to row, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(ROWS):
        ids = torch.randint(3, 60, (LENGTH,), generator=generator)
        labels = torch.where(torch.arange(LENGTH) < 2 + number % 4, ids, -100)
        zeros = torch.zeros(padding, dtype=torch.long)
        rows.append(
            {
                "input_ids": torch.cat([ids, zeros]),
                "attention_mask": torch.cat([torch.ones_like(ids), zeros]),
                "labels": torch.cat([labels, zeros - 100]),
            }
        )
    return rows


def make_student(name: str) -> PreTrainedModel:
    """Return a merged model without dropout and router noise, which fall otherwise where batches are cut otherwise."""
    model = copy.deepcopy(example(name).merged)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    return model


def other_vocabulary() -> PreTrainedModel:
    """Return a teacher of fewer tokens."""
    model = build("mixtral")
    model.resize_token_embeddings(40)
    return model


def make_trainer(
    name: str,
    folder: Path,
    *,
    model: Any = None,
    teacher: Any = None,
    rows: Any = None,
    data_collator: Any = None,
    processing_class: Any = None,
    callbacks: Any = None,
    eval_dataset: Any = None,
    compute_loss_func: Any = None,
    **options: Any,
) -> Any:
    """Return a trainer of two steps on the processor.

    Args:
        teacher: by default the original model; False for none.
    """
    trainer_class, arguments_class = KINDS[name]
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 1} | options
    args = arguments_class(
        output_dir=str(folder), report_to="none", logging_steps=1, use_cpu=True, disable_tqdm=True, **options
    )
    return trainer_class(
        make_student(name) if model is None else model,
        args=args,
        teacher=example(name).base if teacher is None else teacher or None,
        train_dataset=make_rows() if rows is None else rows,
        data_collator=data_collator,
        processing_class=processing_class,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
        compute_loss_func=compute_loss_func,
    )


def stacked(rows: list[Row]) -> Row:
    """Return a batch of rows of one length."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
