"""The demo: the trained Switch Transformer of the package, merged in five ways and compared on held-out text."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration import collect_statistics
from hf_mcsmoe.compress import merge_experts
from hf_mcsmoe.config import MergeConfig
from hf_mcsmoe.denoising import denoising_batches, denoising_metrics, sentinel_token_ids
from hf_mcsmoe.loading import load_model, load_tokenizer
from hf_mcsmoe.plan import plan_merge

ASSETS = Path(__file__).parent / "demo_assets"
SEED = 0
MAX_LENGTH = 96
# What differs from M-SMoE, row by row.
METHODS: dict[str, dict[str, Any]] = {
    "M-SMoE": {},
    "plain averaging": {"alignment": "none", "merging": "uniform"},
    "random groups": {"similarity": "random"},
    "pruning to the dominant": {"merging": "dominant"},
}


@dataclass(frozen=True)
class Result:
    """One row of the demo's table; loss and accuracy of masked tokens on held-out text."""

    name: str
    loss: float
    accuracy: float
    parameters: int
    bytes: int
    tokens_per_second: float


def demo_batches(tokenizer: PreTrainedTokenizerBase, name: str) -> list[dict[str, torch.Tensor]]:
    """Return the batches of the demo's "calibration" or "evaluation" texts, the same in every run."""
    domains = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    texts = [text for domain in domains.values() for text in domain]
    return denoising_batches(texts, tokenizer, batch_size=20, max_length=MAX_LENGTH, seed=SEED)


def run(experts: int | float = 0.5, output: Path | None = None) -> list[Result]:
    """Return the original's row and one for each of `METHODS`; the M-SMoE model is saved to `output`."""
    model, tokenizer = load_model(str(ASSETS / "model"), dtype="float32"), load_tokenizer(str(ASSETS / "model"))
    evaluation = demo_batches(tokenizer, "evaluation")
    unscored = [*sentinel_token_ids(tokenizer), tokenizer.eos_token_id]
    statistics = collect_statistics(model, demo_batches(tokenizer, "calibration"))
    results = [measure("original", model, evaluation, unscored)]
    for name, changes in METHODS.items():
        merged = merge_experts(model, plan_merge(model, statistics, MergeConfig(experts=experts, **changes)))
        results.append(measure(name, merged, evaluation, unscored))
        if name == "M-SMoE" and output is not None:
            merged.save_pretrained(output)
    return results


def measure(name: str, model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], unscored: list[int]) -> Result:
    """Evaluate one model; its speed is that of the fastest of three passes over encoder and decoder tokens."""
    tokens = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        metrics = denoising_metrics(model, batches, unscored)
        seconds.append(time.perf_counter() - started)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Result(name, metrics["loss"], metrics["accuracy"], model.num_parameters(), size, tokens / min(seconds))


def compare(experts: int | float = 0.5, output: Path | None = None) -> Table:
    """Run the demo and return its table."""
    table = Table("", "loss", "accuracy", "parameters", "bytes", "tokens/s", box=None)
    for row in run(experts, output):
        figures = (f"{row.parameters:,}", f"{row.bytes:,}", f"{row.tokens_per_second:,.0f}")
        table.add_row(row.name, f"{row.loss:.3f}", f"{row.accuracy:.1%}", *figures)
    return table
