"""Distillation of a compressed model from its original (paper, section 3.1)."""

from hf_mcsmoe.distillation.arguments import DistillationArguments, DistillationOptions, DistillationSeq2SeqArguments
from hf_mcsmoe.distillation.teacher_outputs import store_teacher_outputs
from hf_mcsmoe.distillation.trainer import (
    DistillationSeq2SeqTrainer,
    DistillationTrainer,
    MCSMoEDistillationTrainer,
)

__all__ = [
    "DistillationArguments",
    "DistillationOptions",
    "DistillationSeq2SeqArguments",
    "DistillationSeq2SeqTrainer",
    "DistillationTrainer",
    "MCSMoEDistillationTrainer",
    "store_teacher_outputs",
]
