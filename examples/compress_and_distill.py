"""Store merged experts as low rank + sparse rows while they learn from the original (MC-SMoE, step 3 of the recipe).

    python examples/compress_and_distill.py --model_name_or_path merged --teacher full --task copa --output_dir small
    accelerate launch examples/compress_and_distill.py ...

Each merged matrix becomes U V + S of rank 32; rows of S go while the model trains, until the share --final_threshold
is left. Defaults are the paper's: 4 % of the steps before and 16 % after pruning, KL of weight 0.2 at temperature 2,
frozen routers; batch size and learning rate by task.
"""

from dataclasses import dataclass, field

from recipe import (
    TaskArguments,
    calibration_samples,
    evaluate,
    leave,
    load,
    load_model,
    mistakes_told_once,
    parse,
    train,
    trainer_data,
)

from hf_mcsmoe import (
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    LoSparseConfig,
    SparsificationCallback,
    compact,
    decompose_experts,
)
from hf_mcsmoe.data.features import calibration_batches


@dataclass
class CompressArguments:
    """How experts are decomposed and pruned (paper, section 3.2)."""

    teacher: str = field(metadata={"help": "the full fine-tuned model: a folder or Hub id"})
    rank: int = field(default=32, metadata={"help": "rank of U V"})
    final_threshold: float = field(default=0.10, metadata={"help": "share of the rows of S that is kept in the end"})
    initial_warmup: float = field(default=0.04, metadata={"help": "share of the steps before the first row goes"})
    final_warmup: float = field(default=0.16, metadata={"help": "share of the steps after the last row went"})
    importance: str = field(default="sensitivity", metadata={"help": "score of a row: sensitivity or magnitude"})
    beta: float = field(default=0.85, metadata={"help": "of the exponential average of scores"})
    factorisation: str = field(
        default="svd", metadata={"help": "svd (the paper's), or weighted_svd by what experts see on training rows"}
    )
    num_samples: int = field(default=256, metadata={"help": "training rows for weighted_svd"})


def main() -> None:
    """Decompose, distil while pruning, store compactly, save and evaluate."""
    classes = (TaskArguments, CompressArguments, DistillationSeq2SeqArguments)
    with mistakes_told_once():
        arguments, choice, training = parse(classes, __doc__ or "")
        model, tokenizer, data = load(arguments, training)
        max_length = arguments.max_source_length or data.task.max_source_length
        batches = None
        if choice.factorisation != "svd":
            sampling = {"num_samples": choice.num_samples, "max_length": max_length, "seed": training.seed}
            batches = calibration_batches(calibration_samples(data), tokenizer, model, **sampling)
        config = LoSparseConfig(rank=choice.rank, keep=choice.final_threshold, factorisation=choice.factorisation)
        model = decompose_experts(model, config, batches)
        pruning = SparsificationCallback(
            keep=choice.final_threshold,
            start=choice.initial_warmup,
            end=choice.final_warmup,
            importance=choice.importance,
            beta=choice.beta,
        )
        trainer = DistillationSeq2SeqTrainer(
            model=model,
            teacher=load_model(choice.teacher),
            args=training,
            callbacks=[pruning],
            **trainer_data(data, model, tokenizer, arguments),
        )
    train(trainer)
    compact(model)
    trainer.save_model()
    evaluate(model, tokenizer, data, arguments, training.per_device_eval_batch_size, training.output_dir)
    leave()


if __name__ == "__main__":
    main()
