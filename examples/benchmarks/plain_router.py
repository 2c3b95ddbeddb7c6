"""Half of the experts, refitted, as a plain checkpoint: what its smaller router costs, before and after it is fitted.

    python examples/benchmarks/plain_router.py ../shared/data/models --seeds 0,1

A seed draws calibration rows from the first halves of the texts beside a model; rows of the second halves judge
("in"), and of texts that were not calibrated on ("out"). KL to the original in nats per token; a part of the
calibration rows decides which router is taken, and is judged by nothing else.
"""

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_mcsmoe import MergeConfig, RepairConfig, compress
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.export import RouterFit, export

ROWS, LENGTH, BATCH, HELD_OUT = 192, 128, 16, 32
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A trained model, and which of its texts it is not calibrated on."""

    name: str
    out: tuple[str, ...] = ()


SUBJECTS = [Subject("qwen3moe-mini-16e"), Subject("olmoe-mini-64e", ("web", "drama"))]


def texts(folder: Path) -> dict[str, str]:
    """Return the texts beside a model by their domain."""
    file = folder / "validation_text.json"
    return json.loads(file.read_text()) if file.is_file() else {"stories": (folder / "validation.txt").read_text()}


def rows_of(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return a text as rows of tokens, int [rows, LENGTH]."""
    ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def batches_of(rows: torch.Tensor) -> list[Batch]:
    """Return rows as batches."""
    return [{"input_ids": part} for part in rows.split(BATCH)]


def measured(subject: Subject, folder: Path, seed: int) -> list[tuple[str, float, float | None, float]]:
    """Return of each stage its name, the KL on text of the kinds calibrated on and of others, and CPU seconds."""
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {name: rows_of(tokenizer, text) for name, text in texts(folder).items()}
    inside = [name for name in rows if name not in subject.out]
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([rows[name][: len(rows[name]) // 2] for name in inside])
    drawn = pool[torch.randperm(len(pool), generator=generator)[:ROWS]]
    fitted, held_out = batches_of(drawn[HELD_OUT:]), batches_of(drawn[:HELD_OUT])
    judging = torch.cat([rows[name][len(rows[name]) // 2 :][: 96 // len(inside)] for name in inside])
    other = [rows[name][:48] for name in subject.out]
    judge = Judge(batches_of(judging), batches_of(torch.cat(other)) if other else [])
    judge.remember(original)
    seconds = {}

    started = time.process_time()
    merged = compress(original, fitted, MergeConfig(experts=0.5, budget="uniform"), repair=RepairConfig())
    seconds["merged, refitted"] = time.process_time() - started
    judge.measure("merged, refitted", merged)
    ways = {name: {"router_rows": name} for name in ("dominant", "mean", "frequency")}
    ways["frequency, router fitted"] = {"fit": RouterFit(fitted, held_out, original)}
    for name, options in ways.items():
        with tempfile.TemporaryDirectory() as output:
            started = time.process_time()
            record = export(merged, output, **options)
            seconds[name] = time.process_time() - started
            judge.measure(name, AutoModelForCausalLM.from_pretrained(output).eval())
        if record.judged:
            held = ", ".join(f"{stage} {value.kl or 0:.4f}" for stage, value in record.quality.items())
            print(f"{record.judged} taken; held out: {held}\n", flush=True)
    figures = {stage: value for stage, value in judge.quality.items() if stage in seconds}
    return [(stage, value.kl or 0.0, value.check_kl, seconds[stage]) for stage, value in figures.items()]


def main() -> None:
    """Print a table per model and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default=None, help="one model by its name")
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for subject in SUBJECTS:
        if options.only not in (None, subject.name):
            continue
        for seed in map(int, options.seeds.split(",")):
            print(f"{subject.name}, seed {seed}", flush=True)
            print("| stage | KL in | KL out | over the merged one, in | CPU seconds |\n|---|---:|---:|---:|---:|")
            found = measured(subject, options.models / subject.name, seed)
            full = found[0][1]
            for stage, inside, outside, seconds in found:
                told = "" if outside is None else f"{outside:.4f}"
                print(f"| {stage} | {inside:.4f} | {told} | {inside / full:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
