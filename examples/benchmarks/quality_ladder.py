"""A ladder of sizes: divergence from the original against bytes, of each method alone and of what a size chooses.

    python examples/benchmarks/quality_ladder.py ../shared/data/models --output runs/ladder.jsonl

Each finished cell is a line of the output, and a run that was stopped goes on; then the tables of docs/results.md
are printed. A seed draws calibration rows from the first halves of the texts beside a model. Rows of the second halves
judge ("in"), and of texts that were not calibrated on ("out"). Share: bytes of the experts as they are stored over
those of the original's in bf16; values that stay floats count two bytes. KL: nats per token that counts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from divergence import Batches, figures, predictions
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_mcsmoe import LoSparseConfig, MergeConfig, RoutingStatistics, collect_statistics, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.data.calibration import sample_features
from hf_mcsmoe.data.features import feature_batches
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.evaluation.costs import bytes_on_disk
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.quantization.codes import group_size_for
from hf_mcsmoe.quantization.config import GROUP_SIZE, QuantizationConfig
from hf_mcsmoe.quantization.quantize import quantize_experts
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.compress import needs_of
from hf_mcsmoe.search.config import SizeConfig

logging.disable_progress_bar()
BATCH_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """A model of the ladder: the text beside it, what of it is not calibrated on, and the levels of each method."""

    folder: str
    text: str
    out: tuple[str, ...]
    experts: tuple[float, ...]
    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    max_length: int = 128


SUBJECTS = (
    Subject("olmoe-mini-64e", "validation_text.json", ("web", "drama"), (0.75, 0.5), (16, 8), (0.25, 0.1875, 0.125)),
    Subject("qwen3moe-mini-16e", "validation.txt", (), (0.75, 0.5), (32, 16), (0.25, 0.1875, 0.125)),
    Subject("switch-mini-16e", "validation_text.json", (), (0.5, 0.25), (16, 8), (0.08, 0.04, 0.02), max_length=96),
)


@dataclass(frozen=True)
class Case:
    """A loaded model, the rows that one seed calibrates on, and the rows that judge, by "in" and "out"."""

    model: PreTrainedModel
    calibration: Batches
    judges: dict[str, Batches]
    references: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]

    @cached_property
    def scores(self) -> RoutingStatistics:
        """Statistics of all but the last batch, which is held out; the first size adds curves, others read them."""
        return collect_statistics(self.model, self.calibration[:-1], needs_of(MergeConfig(), SizeConfig()))

    def judged(self, student: PreTrainedModel) -> dict[str, list[float]]:
        """Return loss and divergence of a student, by "in" and "out"."""
        return {name: figures(student, rows, self.references[name]) for name, rows in self.judges.items()}


@dataclass(frozen=True)
class Made:
    """What a method made of a case: the model, the bytes of its experts, and the divergence that was predicted."""

    student: PreTrainedModel
    expert_bytes: float
    predicted: float | None = None


@dataclass(frozen=True)
class Cell:
    """One rung of one method, as a line of the output."""

    model: str
    seed: int
    method: str
    level: float
    share: float
    kl: dict[str, float]
    more_loss: dict[str, float]  # in percent of the original's
    predicted: float | None
    seconds: float = field(compare=False)


def stored_bytes(model: PreTrainedModel) -> float:
    """Return the bytes of all experts as they are stored, where floats take two."""
    containers = [layer.container for layer, *_ in Layers.of(model).tied]
    tensors = [tensor for container in containers for tensor in container.state_dict().values()]
    return sum(tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors)


def whole(case: Case) -> PreTrainedModel:
    """Return a compressed model that has all experts, as they were."""
    return compress(case.model, case.calibration, MergeConfig(experts=1.0))


def merged(case: Case, experts: float, repair: RepairConfig | None = None, budget: str = "adaptive") -> Made:
    """Merge to a share of the experts."""
    student = compress(case.model, case.calibration, MergeConfig(experts=experts, budget=budget), repair=repair)
    return Made(student, stored_bytes(student))


def of_low_rank(case: Case, rank: int) -> Made:
    """Keep all experts, as low rank + sparse."""
    config = LoSparseConfig(rank=int(rank))
    student = compress(case.model, case.calibration, MergeConfig(experts=1.0), low_rank=config)
    return Made(student, stored_bytes(student))


def quantized(case: Case, bits: int, method: str) -> Made:
    """Keep all experts, in a few bits."""
    student, config = whole(case), QuantizationConfig(bits=int(bits), method=method)
    quantize_experts(student, case.model, case.calibration, config)
    return Made(student, stored_bytes(student))


def torchao_rounded(case: Case, bits: int) -> Made:
    """Round every matrix of an expert as torchao does it for a linear layer, in groups of as many weights."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_  # an optional package

    student, size = whole(case), 0.0
    for layer in Layers.of(student):
        for matrix in (matrix for _, stack in layer.parameters for matrix in stack.detach()):
            group = group_size_for(matrix.shape[-1], GROUP_SIZE)
            linear = nn.Linear(*matrix.shape[::-1], bias=False)
            linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
            quantize_(linear, IntxWeightOnlyConfig(getattr(torch, f"int{bits:.0f}"), PerGroup(group)))
            matrix.copy_(linear.weight.dequantize())
            size += matrix.numel() * bits / 8 + matrix.numel() / group * 2
    return Made(student, size)


def chosen(case: Case, share: float) -> Made:
    """Let the size choose: this share for the experts, and all else as it is."""
    tensors = [tensor for layer, *_ in Layers.of(case.model).tied for _, tensor in layer.parameters]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    size = bytes_on_disk(case.model.name_or_path) - held + int(share * stored_bytes(case.model))
    *fitted, held_out = case.calibration
    student = compress(case.model, fitted, size=f"{size}B", statistics=case.scores, held_out=[held_out])
    taken = record_of(student).size
    return Made(student, stored_bytes(student), taken and taken.predicted_kl)


def rungs(subject: Subject) -> Iterator[tuple[str, float, Callable[[Case, float], Made]]]:
    """Yield each rung of a model's ladder: the method, its level, and what makes it."""
    for share in subject.experts:
        yield "M-SMoE, experts", share, merged
        refitted = partial(merged, repair=RepairConfig(method="joint"))
        yield "M-SMoE + joint refit, experts", share, refitted
        yield "measured budget + joint refit, experts", share, partial(refitted, budget="measured")
    for rank in subject.ranks:
        yield "low rank + sparse, rank", rank, of_low_rank
    for bits in (4, 3, 2):
        yield "nearest, bits", bits, partial(quantized, method="nearest")
        yield "compensated, bits", bits, partial(quantized, method="gptq")
    yield "torchao, bits", 4, torchao_rounded
    for share in subject.shares:
        yield "chosen, share", share, chosen


def halves_of(
    tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int
) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """Return rows of token ids of the first and of the second half of each text."""
    texts = json.loads(path.read_text()) if path.suffix == ".json" else {"text": path.read_text()}
    found = {}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = [ids[start : start + max_length] for start in range(0, len(ids) - max_length + 1, max_length)]
        found[name] = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    return found


def rows_of(
    tokenizer: PreTrainedTokenizerBase, path: Path, out: tuple[str, ...], max_length: int
) -> dict[str, list[list[int]]]:
    """Return rows of token ids: "fit" of first halves, "in" of second halves, and "out" of other texts where named."""
    rows: dict[str, list[list[int]]] = {"fit": [], "in": []} | ({"out": []} if out else {})
    for name, (first, second) in halves_of(tokenizer, path, max_length).items():
        if name in out:
            rows["out"] += second
        else:
            rows["fit"] += first
            rows["in"] += second
    return rows


def batches_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> Batches:
    """Return rows as batches; an encoder-decoder has equal spans of them masked, as the one here was trained."""
    if not model.config.is_encoder_decoder:
        parts = torch.tensor(rows).split(BATCH_SIZE)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]
    samples = [(tokenizer.decode(row), None) for row in rows]
    noise = SpanNoise(fixed_spans=True)
    features = sample_features(samples, tokenizer, encoder_decoder=True, max_length=len(rows[0]), noise=noise)
    return feature_batches(features, tokenizer, BATCH_SIZE, by_length=False)


def cases(subject: Subject, arguments: argparse.Namespace) -> Iterator[tuple[int, Case]]:
    """Yield a case for each seed. The rows that judge are the same for all."""
    folder = arguments.models / subject.folder
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    rows = rows_of(tokenizer, folder / subject.text, subject.out, subject.max_length)
    fit, drawn = rows.pop("fit"), random.Random(0)
    chosen = {name: drawn.sample(part, min(arguments.judge_rows, len(part))) for name, part in rows.items()}
    judges = {name: batches_of(model, tokenizer, part) for name, part in chosen.items()}
    references = {name: predictions(model, part) for name, part in judges.items()}
    for seed in range(arguments.seeds):
        calibration = random.Random(seed).sample(fit, min(arguments.rows, len(fit)))
        yield seed, Case(model, batches_of(model, tokenizer, calibration), judges, references)


def measured(case: Case, make: Callable[[Case, float], Made], level: float) -> dict[str, object]:
    """Return the figures of one rung, by the names of `Cell`."""
    begin, original = time.perf_counter(), case.judged(case.model)
    made = make(case, level)
    found = case.judged(made.student)
    return {
        "share": made.expert_bytes / stored_bytes(case.model),
        "kl": {name: kl for name, (_, kl) in found.items()},
        "more_loss": {name: 100 * (loss / original[name][0] - 1) for name, (loss, _) in found.items()},
        "predicted": made.predicted,
        "seconds": time.perf_counter() - begin,
    }


def climb(arguments: argparse.Namespace) -> list[Cell]:
    """Return all cells: those of the output, and the others, which are measured and appended to it."""
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    cells = [Cell(**json.loads(line)) for line in lines]
    done = {(cell.model, cell.seed, cell.method, cell.level) for cell in cells}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as output:
        for subject in (subject for subject in SUBJECTS if arguments.subject in subject.folder):
            waiting = {(subject.folder, seed, *rung[:2]) for seed in range(arguments.seeds) for rung in rungs(subject)}
            for seed, case in cases(subject, arguments) if waiting - done else ():
                for method, level, make in rungs(subject):
                    if arguments.only in method and (subject.folder, seed, method, level) not in done:
                        cells.append(Cell(subject.folder, seed, method, level, **measured(case, make, level)))
                        print(json.dumps(asdict(cells[-1])), file=output, flush=True)
    return cells


def spread(values: list[float], digits: int = 4) -> str:
    """Return the mean, and the standard deviation where there is one."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{more}"


def table(cells: list[Cell]) -> Iterator[str]:
    """Yield the lines of one model's table: a row per method and level, the largest share first."""
    domains = list(cells[0].kl)
    yield f"| {cells[0].model} | share | {' | '.join(f'KL, {name}' for name in domains)} | more loss, in | seconds |"
    yield f"|---|{'---:|' * (len(domains) + 3)}"
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.level), []).append(cell)
    for (method, level), group in sorted(groups.items(), key=lambda item: -item[1][0].share):
        divergences = [spread([cell.kl[name] for cell in group]) for name in domains]
        loss = f"{spread([cell.more_loss['in'] for cell in group], 2)} %"
        seconds = f"{statistics.fmean(cell.seconds for cell in group):.0f}"
        share = f"{statistics.fmean(cell.share for cell in group):.4f}"
        yield f"| {' | '.join([f'{method} {level:g}', share, *divergences, loss, seconds])} |"


def main() -> None:
    """Measure what is not in the output, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder that holds the models")
    parser.add_argument("--output", type=Path, required=True, help="file of finished cells, a JSON object a line")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration rows (default %(default)s)")
    parser.add_argument("--subject", default="", help="part of the names of the models to measure (default all)")
    parser.add_argument("--only", default="", help="part of the names of the methods to measure (default all)")
    parser.add_argument("--rows", type=int, default=180, help="calibration rows (default %(default)s)")
    parser.add_argument("--judge-rows", type=int, default=96, help="rows that judge (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cells = climb(arguments)
    for subject in SUBJECTS:
        print("", *table([cell for cell in cells if cell.model == subject.folder]), sep="\n")


if __name__ == "__main__":
    main()
