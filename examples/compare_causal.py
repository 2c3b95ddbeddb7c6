"""Compare compressed versions of a causal Mixture-of-Experts model on text: perplexity before and after distillation.

    python examples/compare_causal.py MODEL --train FILE --evaluation FILE --experts 8

The model is merged in several ways, each merged model learns from the original for `--steps` steps, and M-SMoE is then
stored as low rank + sparse while it learns for as many more; or it is merged, repaired and stored as low rank + sparse
in one go, and learns after that. 256 random rows of the text to train on guide the merge.
Figures: perplexity on the text for evaluation, mean and standard deviation over the seeds (which draw the rows and
their order), and what the models hold and execute.
"""

import argparse
import gzip
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, default_data_collator
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
from hf_mcsmoe.accounting import Account, account
from hf_mcsmoe.evaluation import perplexity
from hf_mcsmoe.loading import load_model, load_tokenizer

MERGES: dict[str, dict] = {
    "pruning": {"merging": "dominant"},
    "averaging": {"merging": "uniform", "alignment": "none"},
    "M-SMoE": {},
    "M-SMoE, no alignment": {"alignment": "none"},
    "M-SMoE, uniform weights": {"merging": "uniform"},
    "M-SMoE, uniform budget": {"budget": "uniform"},
    "M-SMoE, refit": {},
}
ONE_SHOT = "MC-SMoE in one shot"
Rows = list[dict[str, torch.Tensor]]


def rows_of(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, until: float = 1.0) -> Rows:
    """Return the first part of a text file (`.gz` or not), up to the share `until`, in rows of `length` tokens."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        text = file.read()
    ids = torch.tensor(tokenizer(text[: int(until * len(text))], add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def batches_of(rows: Rows, size: int = 16) -> Rows:
    """Return the rows joined to batches."""
    return [default_data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows, seed: int, options: argparse.Namespace, keep: float
) -> None:
    """Train a student from its teacher; with `keep` below 1 the rows of S are pruned to that share."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            folder,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=16,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        pruning = [SparsificationCallback(keep)] if keep < 1 else []
        trainer = DistillationTrainer(student, args=arguments, teacher=teacher, train_dataset=rows, callbacks=pruning)
        trainer.remove_callback(ProgressCallback)
        trainer.train()


def versions(
    model: PreTrainedModel, train: Rows, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the versions of a model by name, each as soon as it is made; one may be changed once it was used."""
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:256].tolist()
    calibration = batches_of([train[index] for index in drawn])
    yield "original", model
    if ONE_SHOT in options.methods:
        low_rank = LoSparseConfig(rank=options.rank, keep=options.keep)
        config = MergeConfig(experts=options.experts)
        student = compress(model, calibration, config, repair=RepairConfig(), low_rank=low_rank)
        yield f"{ONE_SHOT}, not distilled", student
        distil(student, model, train, seed, options, keep=1.0)
        yield ONE_SHOT, student
    for name in (name for name in options.methods if name != ONE_SHOT):
        repair = RepairConfig() if name.endswith("refit") else None
        student = compress(model, calibration, MergeConfig(experts=options.experts, **MERGES[name]), repair=repair)
        yield f"{name}, not distilled", student
        distil(student, model, train, seed, options, keep=1.0)
        yield name, student
        if name not in ("M-SMoE", "M-SMoE, refit"):
            continue
        factors = ("svd", None) if repair is None else ("weighted_svd", calibration)
        config = LoSparseConfig(rank=options.rank, keep=options.keep, factorisation=factors[0])
        decompose_experts(student, config, factors[1])
        distil(student, model, train, seed, options, keep=options.keep)
        yield name.replace("M-SMoE", "MC-SMoE"), compact(student)


def main() -> None:
    """Print a markdown table, a row per version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--train-share", type=float, default=1.0, help="use the first part of that text only")
    parser.add_argument("--evaluation", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer on average")
    parser.add_argument("--methods", nargs="+", choices=[*MERGES, ONE_SHOT], default=[*MERGES, ONE_SHOT])
    parser.add_argument("--rank", type=int, default=16, help="rank of U V")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows of S that is kept")
    parser.add_argument("--steps", type=int, default=300, help="of distillation, 16 rows each")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    train = rows_of(options.train, tokenizer, options.length, options.train_share)
    evaluation = batches_of(rows_of(options.evaluation, tokenizer, options.length))
    found: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, Account] = {}
    for seed in options.seeds:
        for name, version in versions(model, train, seed, options):
            found[name].append(perplexity(version, evaluation))
            print(f"seed {seed}: {name}: perplexity {found[name][-1]:.3f}", file=sys.stderr, flush=True)
            if name not in costs:
                costs[name] = account(version, evaluation[0], repetitions=5)
    print("| method | perplexity | parameters | bytes | FLOPs per token | tokens/s |\n|---|---:|---:|---:|---:|---:|")
    for name, values in found.items():
        cost = costs[name]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        sizes = (cost.parameters, cost.bytes_resident, cost.flops_per_token, cost.tokens_per_second)
        print(f"| {name} | {statistics.mean(values):.2f}{spread} | " + " | ".join(f"{x:,.0f}" for x in sizes) + " |")


if __name__ == "__main__":
    main()
