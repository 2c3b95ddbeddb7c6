"""Arguments of the distillation trainers: what they add to those of a Trainer."""

from dataclasses import dataclass, field, fields

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.registry import unknown

TRAIN_PARTS = ("all", "experts", "routers", "lora")
WEIGHTS = ("kd_weight", "hidden_weight", "expert_weight")
# Losses that need more of the teacher than its distribution over the vocabulary at the labels that count.
LIVE_ONLY = {
    "hidden_weight": "the teacher's hidden states",
    "expert_weight": "the outputs of the teacher's layers of experts",
    "reference_kd": "the teacher's logits at masked positions too",
}


@dataclass
class DistillationOptions(Options):
    """What distillation adds to the arguments of a Trainer."""

    file_name = "mcsmoe_distillation.json"

    kd_weight: float = option(0.2, "weight of the divergence from the teacher")
    kd_temperature: float = option(2.0, "temperature T of both distributions")
    hidden_weight: float = option(0.0, "weight of the error of the last hidden states")
    expert_weight: float = option(0.0, "weight of the relative error of the outputs of each layer of experts")
    reference_kd: bool = option(False, "the KL of the paper's released code: no T^2, no mask")
    train_parts: str = option("all", f"what is trained: {', '.join(TRAIN_PARTS)}")
    freeze_routers: bool = option(True, "leave routers as they are, as in the paper")
    lora_rank: int = option(16, "rank of the adapters of train_parts='lora'")
    lora_alpha: float = option(32.0, "the adapters' product is scaled by lora_alpha / lora_rank")
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of linear layers to adapt, e.g. q_proj v_proj; by default all linear layers but routers, "
            "and the experts' stacked matrices"
        },
    )
    teacher_dtype: str = option("auto", "dtype of a teacher given by name")
    teacher_device_map: str | None = option(None, "device map of a teacher given by name")
    teacher_outputs: str | None = option(
        None,
        "folder of the teacher's stored outputs, written first if it is not there; training needs no teacher then",
    )
    teacher_top_k: int = option(64, "tokens of the vocabulary kept per position where the outputs are written")
    allow_uncompressed: bool = option(False, "accept a student that is not compressed")
    # Trainer does not look for such under gradient checkpointing, whose reentrant kind (not the default) forbids it.
    ddp_find_unused_parameters: bool | None = option(
        True, "do not wait for the gradient of an expert that no token of a process chose"
    )

    def check(self) -> None:
        """Raise ValueError for a number out of range, a name that does not exist, or options that exclude others."""
        check_fields(self, DistillationOptions)
        if self.train_parts not in TRAIN_PARTS:
            raise ValueError(unknown("train_parts", self.train_parts, list(TRAIN_PARTS)))
        for name in WEIGHTS:
            if vars(self)[name] < 0:
                raise ValueError(f"{name}={vars(self)[name]} must be finite and not negative.")
        for name in ("kd_temperature", "lora_rank", "lora_alpha", "teacher_top_k"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name}={vars(self)[name]} must be positive and finite.")
        options = [item for item in fields(DistillationOptions) if item.name.startswith("lora_")]
        idle = [item.name for item in options if vars(self)[item.name] != item.default]
        if idle and self.train_parts != "lora":
            raise ValueError(f"{idle[0]} goes with train_parts='lora', not {self.train_parts!r}: leave it out.")
        if self.train_parts == "lora" and not self.freeze_routers:
            raise ValueError("train_parts='lora' trains adapters alone, so routers stay frozen: leave freeze_routers.")
        for name, needed in LIVE_ONLY.items():
            if self.teacher_outputs is not None and vars(self)[name]:
                raise ValueError(
                    f"{name}={vars(self)[name]} needs {needed}, which teacher_outputs does not hold: set it to 0, or "
                    "train with the teacher itself."
                )


@dataclass
class _WithPaperOptimiser(DistillationOptions):
    """What both kinds of arguments have otherwise than the Trainer: the paper's optimiser, and checked options."""

    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.01
    warmup_steps: float = 16

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()  # type: ignore[misc]  # of the Trainer's arguments, which are the next base


@dataclass
class DistillationArguments(_WithPaperOptimiser, TrainingArguments):
    """`TrainingArguments` with the options of distillation; AdamW as in the paper (eps 1e-6, betas 0.9 and 0.98)."""

    to_dict = TrainingArguments.to_dict  # which a Trainer logs


@dataclass
class DistillationSeq2SeqArguments(_WithPaperOptimiser, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the options of distillation and the paper's optimiser."""

    to_dict = TrainingArguments.to_dict  # which a Trainer logs
