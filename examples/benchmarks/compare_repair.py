"""Compare repairs of merged models on held-out text of the calibrated domains and of others, and what each costs.

    python examples/benchmarks/compare_repair.py MODEL --text FILE --out web drama --output runs/repair.jsonl

A text file is one domain, a JSON object one for each of its texts. The first halves of the domains calibrate, rows of
each drawn by a seed; rows of the second halves judge ("in"), and of the domains named by --out, which may lie in files
of --check-data ("out"). Figures: the divergence (KL, nats per token) of the model's predictions from the original's
over the tokens that count, parameters in experts over the original's, and seconds. With --ranks each repaired model is
also stored as low rank + sparse, without training. Each finished cell is a line of the output, and a run that was
stopped goes on; then the table is printed.
"""

import argparse
import copy
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from divergence import Batches, figures, predictions
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

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
from hf_mcsmoe.data.domains import DOMAIN
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.evaluation.costs import expert_parameters
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts

logging.disable_progress_bar()
BATCH_SIZE = 16
PLAIN = "plain"
METHODS: dict[str, RepairConfig | None] = {
    PLAIN: None,
    "refit": RepairConfig(),
    "joint": RepairConfig(method="joint"),
    "joint, sequential": RepairConfig(method="joint", sequential=True),
    "local": RepairConfig(method="local"),
    "local, sequential": RepairConfig(method="local", sequential=True),
    "mean_shift": RepairConfig(method="mean_shift"),
}
MERGES: dict[str, dict] = {
    "adaptive": {},
    "uniform": {"budget": "uniform"},
    "contribution": {"saliency": "contribution"},
    "contribution, uniform": {"saliency": "contribution", "budget": "uniform"},
    "pruned": {"reduce": "prune"},
    "pruned, uniform": {"reduce": "prune", "budget": "uniform"},
}
# Rows of token ids by the names of their domains.
Rows = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Cell:
    """One model: what was measured, and how."""

    model: str
    seed: int
    rows: int
    merge: str
    experts: float
    method: str
    kl: dict[str, float]
    parameters: float  # in experts, over the original's
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others of the model."""
        return self.seed, self.rows, self.merge, self.experts, self.method


@dataclass(frozen=True)
class Judge:
    """Batches that judge, and what the original says of them, by "in" and "out"."""

    batches: dict[str, Batches]
    references: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]

    def divergences(self, student: PreTrainedModel) -> dict[str, float]:
        """Return the divergence of a student, by "in" and "out"."""
        return {name: figures(student, part, self.references[name])[1] for name, part in self.batches.items()}


def texts_of(path: Path) -> dict[str, str]:
    """Return the texts of a file by their names: those of a JSON object, or the whole of a text file."""
    return json.loads(path.read_text()) if path.suffix == ".json" else {path.name: path.read_text()}


def halves(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], max_length: int) -> tuple[Rows, Rows]:
    """Return rows of `max_length` tokens of the first and of the second half of each text."""
    first, second = Rows(), Rows()
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [ids[start : start + max_length] for start in range(0, len(ids) - max_length + 1, max_length)]
        first[name], second[name] = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    return first, second


def drawn(rows: Rows, number: int, seed: int) -> Rows:
    """Return so many of the rows, drawn from all alike."""
    places = [(name, place) for name, part in rows.items() for place in range(len(part))]
    found: Rows = {name: [] for name in rows}
    for name, place in random.Random(seed).sample(places, min(number, len(places))):
        found[name].append(rows[name][place])
    return found


def batches_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Batches:
    """Return rows as batches that know the domains of theirs, mixed.

    An encoder-decoder has equal spans masked, as the Switch Transformer of `../shared/data` was trained.
    """
    noise, features = SpanNoise(fixed_spans=True), []
    for number, part in enumerate(rows.values()):
        if model.config.is_encoder_decoder:
            samples = [(tokenizer.decode(row), None) for row in part]
            length = max(map(len, part), default=1)
            made = sample_features(samples, tokenizer, encoder_decoder=True, max_length=length, noise=noise)
        else:
            made = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in part]
        features += [{**feature, DOMAIN: [number]} for feature in made]
    random.Random(0).shuffle(features)
    return feature_batches(features, tokenizer, BATCH_SIZE, by_length=False)


def judge_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: dict[str, Rows], number: int) -> Judge:
    """Return what judges: so many rows of each part, the same ones for all seeds."""
    chosen = {name: drawn(rows, number, 0) for name, rows in parts.items() if rows}
    batches = {name: batches_of(model, tokenizer, rows) for name, rows in chosen.items()}
    return Judge(batches, {name: predictions(model, part) for name, part in batches.items()})


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fit: Rows, judge: Judge, arguments: argparse.Namespace
) -> Iterator[Cell]:
    """Yield the cells that the output does not hold."""
    name, whole = Path(arguments.model).name, expert_parameters(model)
    done = {cell.key for cell in read(arguments.output) if cell.model == name}
    for seed, number in product(range(arguments.seeds), arguments.rows):
        calibration = batches_of(model, tokenizer, drawn(fit, number, seed))
        for merge, experts in product(arguments.merges, arguments.experts):
            key = seed, number, merge, experts
            waiting = [method for method in arguments.methods if (*key, method) not in done]
            config = MergeConfig(experts=int(experts) if experts > 1 else experts, **MERGES[merge])
            if not waiting:
                continue
            plan = plan_merge(model, collect_statistics(model, calibration, config.needs), config)
            for method in waiting:
                student, repair, seconds = merge_experts(model, plan), METHODS[method], 0.0
                if repair:
                    seconds = repair_experts(student, model, calibration, repair).seconds
                for label, stored in stored_too(student, method, calibration, arguments):
                    share = expert_parameters(stored) / whole
                    yield Cell(name, *key, label, judge.divergences(stored), share, seconds)


def stored_too(
    student: PreTrainedModel, method: str, calibration: Batches, arguments: argparse.Namespace
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the model, and for each rank its experts as low rank + sparse."""
    yield method, student
    for rank in arguments.ranks:
        config = LoSparseConfig(rank=rank, keep=arguments.keep)
        yield (
            f"{method}, rank {rank}",
            compact(decompose_experts(copy.deepcopy(student), config, calibration, prune=True)),
        )


def read(path: Path) -> list[Cell]:
    """Return the cells that a file holds."""
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation where there is one."""
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(found: list[Cell]) -> Iterator[str]:
    """Yield the lines of the table: a row for each merge, number of experts, of calibration rows, and repair."""
    names = list(found[0].kl) if found else []
    yield f"| merge | experts | rows | repair | {' | '.join(f'KL, {name}' for name in names)} | in experts | seconds |"
    yield f"|---|---:|---:|---|{'---:|' * (len(names) + 2)}"
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.merge, cell.experts, cell.rows, cell.method), []).append(cell)
    for (merge, experts, rows, method), group in groups.items():
        divergences = [spread([cell.kl[name] for cell in group]) for name in names]
        parameters = f"{statistics.fmean(cell.parameters for cell in group):.0%}"
        seconds = f"{statistics.fmean(cell.seconds for cell in group):.0f}"
        yield f"| {' | '.join([merge, f'{experts:g}', str(rows), method, *divergences, parameters, seconds])} |"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder or Hub id")
    made.add_argument("--text", type=Path, required=True, help="text file, or JSON object of texts")
    made.add_argument(
        "--check-data", type=Path, nargs="+", default=[], help="more of them, of which --out names texts"
    )
    made.add_argument("--out", nargs="+", default=[], help="texts that are not calibrated on (default: --check-data)")
    made.add_argument("--output", type=Path, required=True, help="file of finished cells, a JSON object a line")
    made.add_argument("--experts", type=float, nargs="+", default=[0.75, 0.5], help="a share, or how many per layer")
    made.add_argument("--merges", nargs="+", default=["adaptive"], choices=MERGES, help="how experts become fewer")
    methods = [PLAIN, "refit", "joint", "local"]
    made.add_argument("--methods", nargs="+", default=methods, choices=METHODS, help="repairs")
    made.add_argument("--rows", type=int, nargs="+", default=[64, 180], help="calibration rows")
    made.add_argument("--judge-rows", type=int, default=64, help="rows that judge (default %(default)s)")
    made.add_argument("--seeds", type=int, default=2, help="draws of calibration rows (default %(default)s)")
    made.add_argument("--ranks", type=int, nargs="*", default=[], help="ranks of U V, e.g. 8 16 32")
    made.add_argument("--keep", type=float, default=0.1, help="share of S that is kept")
    made.add_argument("--max-length", type=int, default=128, help="tokens a row (default %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    return made


def main() -> None:
    """Measure what is not in the output, and print the table."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    others = {name: text for path in arguments.check_data for name, text in texts_of(path).items()}
    first, second = halves(tokenizer, {**others, **texts_of(arguments.text)}, arguments.max_length)
    out = set(arguments.out or others)
    if missing := out - set(first):
        raise SystemExit(f"--out {' '.join(sorted(missing))}: there is no such text, but {', '.join(first)}")
    own = [name for name in texts_of(arguments.text) if name not in out]
    parts = {"in": {name: second[name] for name in own}, "out": {name: second[name] for name in sorted(out)}}
    judge = judge_of(model, tokenizer, parts, arguments.judge_rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as output:
        for cell in cells(model, tokenizer, {name: first[name] for name in own}, judge, arguments):
            print(json.dumps(asdict(cell)), file=output, flush=True)
    name = Path(arguments.model).name
    print(*table([cell for cell in read(arguments.output) if cell.model == name]), sep="\n")


if __name__ == "__main__":
    main()
