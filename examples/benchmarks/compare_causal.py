"""Compare compressed versions of a causal Mixture-of-Experts model on text: perplexity before and after distillation.

    python examples/benchmarks/compare_causal.py MODEL --train FILE --evaluation FILE --experts 8

The model is merged in several ways, each merged model learns from the original for `--steps` steps, and M-SMoE is then
stored as low rank + sparse while it learns for as many more; or it is merged, repaired and stored as low rank + sparse
in one go, and learns after that. 256 random blocks of the text to train on guide the merge.
Figures: perplexity on the text for evaluation, mean and standard deviation over the seeds (which draw the rows and
their order), and what the models hold and execute.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging

from hf_mcsmoe import (
    DistillationArguments,
    DistillationTrainer,
    LoSparseConfig,
    MergeConfig,
    RepairConfig,
    SparsificationCallback,
    compact,
    compress,
    decompose_experts,
)
from hf_mcsmoe.data.features import Feature, collator, feature_batches, text_features
from hf_mcsmoe.data.text import read_samples
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.evaluation.quality import perplexity
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.record import Costs

METHODS: dict[str, dict] = {
    "M-SMoE (adaptive budget)": {},
    "M-SMoE, uniform budget": {"budget": "uniform"},
    "no alignment": {"alignment": "none"},
    "aligned to the first expert": {"reference": "first"},
    "uniform weights": {"weighting": "uniform"},
    "plain averaging": {"alignment": "none", "weighting": "uniform"},
    "random groups": {"similarity": "random"},
    "pruning to the dominant": {"weighting": "dominant"},
}
REFIT, ONE_SHOT = "M-SMoE, refit", "MC-SMoE in one shot"
NAMES = [*METHODS, REFIT, ONE_SHOT]
# Blocks of the text to train on that guide the merge.
SAMPLE = 256
BATCH_SIZE = 16
# The versions that are stored as low rank + sparse while they learn on, and by what factors.
DECOMPOSED = {"M-SMoE (adaptive budget)": "svd", REFIT: "weighted_svd"}


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Feature],
    seed: int,
    options: argparse.Namespace,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train a student from its teacher."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            folder,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=BATCH_SIZE,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student,
            args=arguments,
            teacher=teacher,
            train_dataset=rows,
            data_collator=collator(tokenizer),
            callbacks=[*callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def versions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Feature],
    seed: int,
    options: argparse.Namespace,
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the versions of a model by name, each as soon as it is made; one may be changed once it was used."""
    drawn = random.Random(seed).sample(train, min(SAMPLE, len(train)))
    calibration = feature_batches(drawn, tokenizer, BATCH_SIZE)
    yield "original", model
    for name in options.methods:
        config = MergeConfig(experts=options.experts, **METHODS.get(name, {}))
        repair = RepairConfig() if name in (REFIT, ONE_SHOT) else None
        low_rank = LoSparseConfig(
            rank=options.rank, keep=options.keep, factorisation=DECOMPOSED.get(name, "weighted_svd")
        )
        one_shot = low_rank if name == ONE_SHOT else None
        student = compress(model, calibration, config, repair=repair, low_rank=one_shot)
        yield f"{name}, not distilled", student
        distil(student, model, tokenizer, train, seed, options)
        yield name, student
        if name in DECOMPOSED:
            decompose_experts(student, low_rank, calibration)
            distil(student, model, tokenizer, train, seed, options, [SparsificationCallback(options.keep)])
            yield f"{name}, then MC-SMoE", compact(student)


def main() -> None:
    """Print a markdown table, a row per version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--train", required=True, help="text to train on, as for `hf-mcsmoe distill`")
    parser.add_argument("--train-share", type=float, default=1.0, help="use the first part of that text only")
    parser.add_argument("--evaluation", required=True, help="text to evaluate on")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer on average")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, help="versions")
    parser.add_argument("--rank", type=int, default=16, help="rank of U V")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows of S that is kept")
    parser.add_argument("--steps", type=int, default=300, help=f"of distillation, {BATCH_SIZE} blocks each")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    train, evaluation = (
        text_features(read_samples(path), tokenizer, encoder_decoder=False, max_length=options.length)
        for path in (options.train, options.evaluation)
    )
    train = train[: round(options.train_share * len(train))]
    evaluation_batches = feature_batches(evaluation, tokenizer, BATCH_SIZE)
    found: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, Costs] = {}
    for seed in options.seeds:
        for name, version in versions(model, tokenizer, train, seed, options):
            found[name].append(perplexity(version, evaluation_batches))
            print(f"seed {seed}: {name}: perplexity {found[name][-1]:.3f}", file=sys.stderr, flush=True)
            if name not in costs:
                costs[name] = account(version, evaluation_batches[-1], repetitions=5)
    print("| method | perplexity | parameters | bytes | FLOPs per token | tokens/s |\n|---|---:|---:|---:|---:|---:|")
    for name, values in found.items():
        cost = costs[name]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        sizes = (cost.parameters, cost.bytes_resident, cost.flops_per_token, cost.tokens_per_second)
        print(f"| {name} | {statistics.mean(values):.2f}{spread} | " + " | ".join(f"{x:,.0f}" for x in sizes) + " |")


if __name__ == "__main__":
    main()
