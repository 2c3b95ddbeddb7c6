"""Compare repairs of merged models on held-out text: divergence from the original, and what each costs.

    python examples/benchmarks/compare_repair.py MODEL --text FILE --experts 8 4

The first half of the text calibrates, the second evaluates; with several `--batches` the merge is guided by all of the
first half, and the repair by so much of it. With `--ranks` each repaired model is also stored as low rank + sparse,
without training. Figures: the divergence (KL, nats per token) of the model's predictions from the original's over the
tokens that count, its share of the unrepaired model's, parameters in experts over the original's, and seconds.
"""

import argparse
import copy
import json
import random
from itertools import product
from pathlib import Path

import torch
from compare_methods import Batches, figures, predictions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe import (
    LoSparseConfig,
    MergeConfig,
    collect_statistics,
    compact,
    decompose_experts,
    merge_experts,
    plan_merge,
)
from hf_mcsmoe.data.calibration import sample_features
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.evaluation.costs import expert_parameters
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts

METHODS: dict[str, RepairConfig] = {
    "refit": RepairConfig(),
    "joint": RepairConfig(method="joint"),
    "joint, sequential": RepairConfig(method="joint", sequential=True),
    "local": RepairConfig(method="local"),
    "local, sequential": RepairConfig(method="local", sequential=True),
    "mean_shift": RepairConfig(method="mean_shift"),
}


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file: the values of a JSON object, or the whole of a text file."""
    return list(json.loads(path.read_text()).values()) if path.suffix == ".json" else [path.read_text()]


def halves(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int
) -> tuple[Batches, Batches]:
    """Return batches of the first and of the second half of each text, in rows of `max_length` tokens."""
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text in texts_of(path):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [ids[start : start + max_length] for start in range(0, len(ids) - max_length + 1, max_length)]
        rows[0].extend(whole[: len(whole) // 2])
        rows[1].extend(whole[len(whole) // 2 :])
    random.Random(0).shuffle(rows[0])  # so that a part of them is of all texts
    first, second = (_batches(model, tokenizer, half, max_length) for half in rows)
    return first, second


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_length: int
) -> Batches:
    if model.config.is_encoder_decoder:
        samples = [(tokenizer.decode(row), None) for row in rows]
        features = sample_features(samples, tokenizer, encoder_decoder=True, max_length=max_length)
        return feature_batches(features, tokenizer, 16, by_length=False)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.tensor(rows).split(16)]


def main() -> None:
    """Print a markdown table: a row per number of experts, budget and repair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--text", type=Path, required=True, help="text file, or JSON object of texts")
    parser.add_argument("--experts", type=int, nargs="+", default=[8], help="experts per layer on average")
    parser.add_argument("--budgets", nargs="+", default=["adaptive", "uniform"], help="how layers share the experts")
    parser.add_argument("--methods", nargs="+", default=["refit", "local"], choices=METHODS, help="repairs")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        help="calibration batches of 16 rows for the repair, e.g. 1 2 4 8; all by default",
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="ranks of U V, e.g. 8 16 32")
    parser.add_argument("--keep", type=float, default=0.1, help="share of S that is kept")
    parser.add_argument("--max-length", type=int, default=96, help="tokens a row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    calibration, evaluation = halves(model, tokenizer, arguments.text, arguments.max_length)
    statistics, reference = collect_statistics(model, calibration), predictions(model, evaluation)
    whole = expert_parameters(model)
    print("| experts | budget | repair | rows | KL | of plain | in experts | seconds |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    for count, budget in product(arguments.experts, arguments.budgets):
        plan = plan_merge(model, statistics, MergeConfig(experts=count, budget=budget))
        plain = figures(merge_experts(model, plan), evaluation, reference)[1]
        print(f"| {count} | {budget} | none | | {plain:.5f} | 1.00 | | |", flush=True)
        for name, number in product(arguments.methods, arguments.batches or [len(calibration)]):
            student, part = merge_experts(model, plan), calibration[:number]
            seconds = repair_experts(student, model, part, METHODS[name]).seconds
            rows = sum(len(batch["input_ids"]) for batch in part)
            stored = {name: student}
            for rank in arguments.ranks:
                config = LoSparseConfig(rank=rank, keep=arguments.keep)
                small = decompose_experts(copy.deepcopy(student), config, part, prune=True)
                stored[f"{name}, rank {rank}"] = compact(small)
            for label, version in stored.items():
                found, share = figures(version, evaluation, reference)[1], expert_parameters(version) / whole
                cells = [count, budget, label, rows, f"{found:.5f}", f"{found / plain:.2f}", f"{share:.0%}"]
                print("| " + " | ".join(map(str, [*cells, f"{seconds:.1f}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
