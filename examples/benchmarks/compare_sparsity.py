"""Compare scores of weights inside experts on held-out text: how much is lost where the lowest are left out.

    python examples/benchmarks/compare_sparsity.py MODEL --text FILE --output runs/sparsity.jsonl

A text file is one domain, a JSON object one for each of its texts. Rows of the first halves calibrate, drawn anew for
each seed; rows of the second halves judge. The figure is the divergence (KL, nats per token) of the sparse model's
predictions from the original's, without any training. Each finished cell is a line of the output, and a run that was
stopped goes on; then the table is printed.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from compare_repair import Judge, Rows, batches_of, drawn, halves, judge_of, spread, texts_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_mcsmoe.evaluation.costs import expert_parameters
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.sparsity.config import PATTERNS, SparsityConfig
from hf_mcsmoe.sparsity.sparsify import sparsify_experts

logging.disable_progress_bar()


@dataclass(frozen=True)
class Cell:
    """One sparse model: what was measured, and how."""

    model: str
    seed: int
    pattern: str
    share: float
    score: str
    kl: float
    parameters: float  # in experts, over the original's

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others of the model."""
        return self.seed, self.pattern, self.share, self.score


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fit: Rows, judge: Judge, arguments: argparse.Namespace
) -> Iterator[Cell]:
    """Yield the cells that the output does not hold; without data there is one seed."""
    name, whole = Path(arguments.model).name, expert_parameters(model)
    done = {cell.key for cell in read(arguments.output) if cell.model == name}
    for seed in range(arguments.seeds):
        calibration = batches_of(model, tokenizer, drawn(fit, arguments.rows, seed))
        for pattern, share, score in product(arguments.patterns, arguments.shares, arguments.scores):
            reads = bool(SCORE.needs(score))
            impossible = pattern == "2:4" and share != 0.5
            if impossible or (seed and not reads) or (seed, pattern, share, score) in done:
                continue
            config = SparsityConfig(score=score, pattern=pattern, share=share)
            sparse = sparsify_experts(copy.deepcopy(model), calibration if reads else None, config)
            kl = judge.divergences(sparse)["in"]
            yield Cell(name, seed, pattern, share, score, kl, expert_parameters(sparse) / whole)


def read(path: Path) -> list[Cell]:
    """Return the cells that a file holds."""
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def table(found: list[Cell], scores: list[str]) -> Iterator[str]:
    """Yield the lines of the table: a row for each pattern and share, a column for each score."""
    yield f"| pattern | left out | in experts | {' | '.join(scores)} |"
    yield f"|---|---:|---:|{'---:|' * len(scores)}"
    for pattern, share in dict.fromkeys((cell.pattern, cell.share) for cell in found):
        group = [cell for cell in found if (cell.pattern, cell.share) == (pattern, share)]
        values = [[cell.kl for cell in group if cell.score == score] for score in scores]
        told = [spread(part) if part else "" for part in values]
        yield f"| {pattern} | {share:.0%} | {group[0].parameters:.0%} | {' | '.join(told)} |"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="folder or Hub id")
    made.add_argument("--text", type=Path, required=True, help="text file, or JSON object of texts")
    made.add_argument("--output", type=Path, required=True, help="file of finished cells, a JSON object a line")
    made.add_argument("--scores", nargs="+", default=list(SCORE), choices=list(SCORE), help="scores of weights")
    made.add_argument("--patterns", nargs="+", default=["unstructured"], choices=PATTERNS, help="what is left out")
    made.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.6, 0.7], help="how much of it")
    made.add_argument("--rows", type=int, default=128, help="calibration rows (default %(default)s)")
    made.add_argument("--judge-rows", type=int, default=64, help="rows that judge (default %(default)s)")
    made.add_argument("--seeds", type=int, default=3, help="draws of calibration rows (default %(default)s)")
    made.add_argument("--max-length", type=int, default=128, help="tokens a row (default %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    return made


def main() -> None:
    """Measure what is not in the output, and print the table."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    first, second = halves(tokenizer, texts_of(arguments.text), arguments.max_length)
    judge = judge_of(model, tokenizer, {"in": second}, arguments.judge_rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a") as output:
        for cell in cells(model, tokenizer, first, judge, arguments):
            print(json.dumps(asdict(cell)), file=output, flush=True)
    name = Path(arguments.model).name
    print(*table([cell for cell in read(arguments.output) if cell.model == name], arguments.scores), sep="\n")


if __name__ == "__main__":
    main()
