"""The demo: the trained Switch Transformer of the package, merged in several ways and compared on held-out text."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.compress import compress
from hf_mcsmoe.data.features import feature_batches, pair_features
from hf_mcsmoe.data.tasks import Example
from hf_mcsmoe.layers.batches import forward
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.config import SizeConfig

ASSETS = Path(__file__).parent / "demo_assets"
BATCH_SIZE = 120
# What differs from M-SMoE, row by row.
METHODS: dict[str, dict[str, Any]] = {
    "M-SMoE": {},
    "plain averaging": {"alignment": "none", "weighting": "uniform"},
    "random groups": {"similarity": "random"},
    "pruning to the dominant": {"weighting": "dominant"},
}
# What is done to the M-SMoE model in further rows.
REFINEMENTS: dict[str, dict[str, Any]] = {
    "M-SMoE, refit": {"repair": RepairConfig()},
    "MC-SMoE, refit": {"repair": RepairConfig(), "low_rank": LoSparseConfig(rank=16, keep=0.1)},
}
JOINT = RepairConfig(method="joint")
ONE, BITS, MIXTURE = "one expert a layer", "2 bits", "size of 2 bits"
# Small ones: by merging alone, by bits alone, and what a search finds for the bytes of the latter.
SMALL: dict[str, tuple[MergeConfig, dict[str, Any]]] = {
    ONE: (MergeConfig(experts=1), {"repair": JOINT}),
    BITS: (MergeConfig(experts=1.0), {"repair": JOINT, "quantization": QuantizationConfig(bits=2)}),
}


def demo_examples(name: str) -> list[Example]:
    """Return the "calibration" or the "evaluation" examples of the package: rewritings of a text, grouped by task."""
    lines = (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [Example(row["text"], (row["target"],), group=row["task"]) for row in rows]


def rewriting(task: str, source: str, target: str) -> Example:
    """Return an example of a task: what is given, behind the sign of the task, and what is wanted."""
    return Example(f"<{task}>{source}", (target,), group=task)


def batches(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], batch_size: int = BATCH_SIZE
) -> list[dict[str, torch.Tensor]]:
    """Return the examples in batches: `input_ids`, `attention_mask` [batch, source], `labels` [batch, target]."""
    features = pair_features([item.pair for item in examples], tokenizer)
    return feature_batches(features, tokenizer, batch_size, by_length=False)


def demo_batches(tokenizer: PreTrainedTokenizerBase, name: str) -> list[dict[str, torch.Tensor]]:
    """Return the "calibration" or the "evaluation" examples of the package as batches."""
    return batches(tokenizer, demo_examples(name))


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, float]:
    """Return the loss per letter and the accuracy: the share of examples that greedy generation gets wholly right."""
    loss = letters = right = 0.0
    for start, batch in enumerate(batches(tokenizer, examples)):
        counted = int((batch["labels"] != -100).sum())
        loss, letters = loss + float(forward(model, batch).loss) * counted, letters + counted
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        answers = cast(Any, model).generate(
            **inputs, max_new_tokens=batch["labels"].shape[1], do_sample=False, num_beams=1
        )
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        part = examples[start * BATCH_SIZE :][: len(texts)]
        right += sum(text in item.targets for text, item in zip(texts, part, strict=True))
    return {"loss": loss / letters, "accuracy": right / len(examples)}


@dataclass(frozen=True)
class Result:
    """One row of the demo's table."""

    name: str
    loss: float
    accuracy: float
    parameters: int
    bytes: int
    tokens_per_second: float


def run(experts: int | float = 0.5, output: Path | None = None) -> list[Result]:
    """Return the original's row, one for each way, and one for a search; the M-SMoE model is saved to `output`."""
    model, tokenizer = load_model(str(ASSETS / "model"), dtype="float32"), load_tokenizer(str(ASSETS / "model"))
    calibration = demo_batches(tokenizer, "calibration")
    statistics = collect_statistics(model, calibration)
    rows: dict[str, tuple[MergeConfig, dict[str, Any]]]
    rows = {name: (MergeConfig(experts=experts, **changes), {}) for name, changes in METHODS.items()}
    rows |= {name: (MergeConfig(experts=experts), steps) for name, steps in REFINEMENTS.items()}
    rows |= SMALL
    models = {"original": model}
    for name, (config, steps) in rows.items():
        models[name] = compress(model, calibration, config, statistics=statistics, **steps)
    size = SizeConfig(f"{held_bytes(models[BITS])}B", bits=(4, 3, 2), reduce="merge")
    models[MIXTURE] = compress(model, calibration, repair=JOINT, size=size)
    if output is not None:
        models["M-SMoE"].save_pretrained(output)
    examples = demo_examples("evaluation")
    speeds = tokens_per_second(models, batches(tokenizer, examples[:BATCH_SIZE])[0])
    results = []
    for name, merged in models.items():
        metrics = evaluate(merged, tokenizer, examples)
        held = (merged.num_parameters(), held_bytes(merged), speeds[name])
        results.append(Result(name, metrics["loss"], metrics["accuracy"], *held))
    return results


def held_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of what a model would be saved with, tensors that several names share once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


@torch.no_grad()
def tokens_per_second(models: dict[str, PreTrainedModel], batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the tokens of source and target that each model takes per second: its fastest of nine turns in a row."""
    tokens = int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum())
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(9):
        for name, model in models.items():
            started = time.perf_counter()
            forward(model, batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: tokens / min(turns) for name, turns in seconds.items()}


def compare(experts: int | float = 0.5, output: Path | None = None) -> Table:
    """Run the demo and return its table."""
    rows, ways = run(experts, output), len(METHODS) + len(REFINEMENTS) + len(SMALL) + 1
    caption = (
        f"A trained Switch Transformer, made smaller in {ways} ways. loss: nats per letter of held-out examples; "
        "accuracy: share of them that generation gets wholly right; tokens/s: fastest of nine forwards here."
    )
    table = Table("", "loss", "accuracy", "parameters", "bytes", "tokens/s", box=None, caption=caption)
    for row in rows:
        figures = (f"{row.parameters:,}", f"{row.bytes:,}", f"{row.tokens_per_second:,.0f}")
        table.add_row(row.name, f"{row.loss:.3f}", f"{row.accuracy:.1%}", *figures)
    return table
