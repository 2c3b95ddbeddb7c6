"""Store merged experts as low rank + sparse rows while they learn from the original (MC-SMoE, step 3 of the recipe).

    python examples/compress_and_distill.py --model_name_or_path merged --teacher full --task copa --output_dir small
    accelerate launch examples/compress_and_distill.py ...

Each merged matrix becomes U V + S; rows of S go while the model trains, until the share --final_threshold is left.
Defaults are the paper's.
"""

from dataclasses import MISSING, dataclass

from recipe import TaskArguments, calibration, evaluate, load, parse, trainer_data

import hf_mcsmoe as mc
from hf_mcsmoe.distillation.checkpoints import train_or_resume
from hf_mcsmoe.distillation.processes import mistakes_reported_once, shut_down_processes
from hf_mcsmoe.layers.loading import load_model
from hf_mcsmoe.methods.config import option


@dataclass
class CompressArguments:
    """How experts are decomposed and pruned (paper, section 3.2)."""

    teacher: str = option(MISSING, "the full fine-tuned model: a folder or Hub id")
    rank: int = option(32, "rank of U V")
    final_threshold: float = option(0.10, "share of the rows of S that is kept in the end")
    initial_warmup: float = option(0.04, "share of the steps before the first row goes")
    final_warmup: float = option(0.16, "share of the steps after the last row went")
    importance: str = option("sensitivity", "score of a row: sensitivity or magnitude")
    beta: float = option(0.85, "of the exponential average of scores")
    factorisation: str = option("svd", "svd (the paper's), or weighted_svd by what experts see on training rows")
    num_samples: int = option(256, "training rows for weighted_svd")


def main() -> None:
    """Decompose, distil while pruning, store compactly, save and evaluate."""
    with mistakes_reported_once():
        classes = [TaskArguments, CompressArguments, mc.DistillationSeq2SeqArguments]
        arguments, choice, training = parse(classes, __doc__ or "")
        model, tokenizer, data = load(arguments, training)
        sampling, keep = {"num_samples": choice.num_samples, "seed": training.seed}, choice.final_threshold
        weighted = choice.factorisation != "svd"
        batches = calibration(data, model, tokenizer, **sampling) if weighted else None
        config = mc.LoSparseConfig(rank=choice.rank, keep=keep, factorisation=choice.factorisation)
        model = mc.decompose_experts(model, config, batches)
        scores = {"importance": choice.importance, "beta": choice.beta}
        pruning = mc.SparsificationCallback(keep, start=choice.initial_warmup, end=choice.final_warmup, **scores)
        given = {"teacher": load_model(choice.teacher), **trainer_data(data, model, tokenizer)}
        trainer = mc.DistillationSeq2SeqTrainer(model=model, args=training, callbacks=[pruning], **given)
    train_or_resume(trainer)
    mc.compact(model)
    trainer.save_model()
    evaluate(data, model, tokenizer, training)
    shut_down_processes()


if __name__ == "__main__":
    main()
