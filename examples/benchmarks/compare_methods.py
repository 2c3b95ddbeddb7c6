"""Compare the published methods and this project's on trained models, in and out of the domains that are calibrated.

    python examples/benchmarks/compare_methods.py ../shared/data/models --output runs/methods

Each model and draw has a folder in the output, which `hf_mcsmoe.compare.run.compare` fills and goes on with where it
was stopped, so that draws may run side by side; then the table of docs/results.md is printed. A seed draws calibration
rows from the first halves of the texts beside a model. Rows of the second halves judge ("in"), and rows of texts that
were not calibrated on ("out"). KL: nats per token that counts. Sizes are those of the weight files with such shares of
the experts in every layer, in `--sizes-in` bits.
"""

import argparse
import gzip
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from divergence import Batches
from quality_ladder import batches_of, halves_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_mcsmoe.compare.cells import Cell, Row
from hf_mcsmoe.compare.cells import rows_of as means_of
from hf_mcsmoe.compare.grid import Grid
from hf_mcsmoe.compare.run import compare
from hf_mcsmoe.compare.sizes import bytes_with
from hf_mcsmoe.compare.ways import ways_of
from hf_mcsmoe.data.domains import DomainBatch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

logging.disable_progress_bar()
# Of other text so many letters are enough.
LETTERS = 200_000


@dataclass(frozen=True)
class Subject:
    """A model: the text beside it, what of it is not calibrated on, or other text, and the tokens of a row."""

    folder: str
    text: str
    out: tuple[str, ...] = ()
    other: str = ""
    max_length: int = 128


SUBJECTS = (
    Subject("olmoe-mini-64e", "validation_text.json", ("web", "drama")),
    Subject("qwen3moe-mini-16e", "validation.txt", other="../text/tinyshakespeare.txt.gz"),
    Subject("switch-mini-16e", "validation_text.json", ("code",), max_length=96),
)


def texts_of(
    subject: Subject, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, dict[int, Batches], dict[str, Batches]]:
    """Return a model, its calibration batches by seed, and the batches that judge, "in" and "out"."""
    folder = arguments.models / subject.folder
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    halves = halves_of(tokenizer, folder / subject.text, subject.max_length)
    inside = [parts for name, parts in halves.items() if name not in subject.out]
    fit = [(row, number) for number, (first, _) in enumerate(inside) for row in first]
    found = {"in": [row for _, second in inside for row in second]}
    if subject.out:
        found["out"] = [row for name in subject.out for row in halves[name][1]]
    if subject.other:
        text = gzip.decompress((arguments.models / subject.other).read_bytes()).decode()[:LETTERS]
        ids, length = tokenizer(text, verbose=False)["input_ids"], subject.max_length
        found["out"] = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    drawn = {seed: random.Random(seed).sample(fit, min(arguments.rows, len(fit))) for seed in arguments.seeds}
    number = arguments.judge_rows
    judging = {name: random.Random(0).sample(part, min(number, len(part))) for name, part in found.items()}
    draws = {seed: _with_domains(model, tokenizer, part) for seed, part in drawn.items()}
    return model, draws, {name: batches_of(model, tokenizer, part) for name, part in judging.items()}


def _with_domains(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawn: Sequence[tuple[list[int], int]]
) -> Batches:
    """Return rows as batches that know of which text each is."""
    batches, first, found = batches_of(model, tokenizer, [row for row, _ in drawn]), 0, []
    for batch in batches:
        last = first + len(batch["input_ids"])
        found.append(DomainBatch(batch, torch.tensor([number for _, number in drawn[first:last]])))
        first = last
    return found


def grid_of(model: PreTrainedModel, arguments: argparse.Namespace) -> Grid:
    """Return what is compared on a model: methods at shares of the experts, and at the bytes that shares take."""
    way = ways_of(["frequency-prune"], arguments.sizes_in)[0]  # whose files have the longest headers
    layers = Layers.of(model)
    sizes = [f"{bytes_with(layers, way.options(), share)}B" for share in arguments.sizes]
    return Grid(arguments.methods.split(","), arguments.experts, sizes, arguments.bits)


def compared(subject: Subject, arguments: argparse.Namespace) -> Iterator[Cell]:
    """Compare the methods on one model, a draw after the other, and yield the cells; what is finished is kept."""
    model, draws, judges = texts_of(subject, arguments)
    model.to(arguments.device)
    bits = f"-{arguments.bits}bits" if arguments.bits else ""
    for seed, draw in draws.items():
        folder = arguments.output / f"{subject.folder}{bits}-{seed}"
        yield from compare(model, {seed: draw}, judges, grid_of(model, arguments), folder, told=_tell).cells


def _tell(cells: list[Cell]) -> None:
    """Print the cell that was finished last."""
    cell = cells[-1] if cells else None
    if cell is not None:
        told = ", ".join(f"{name} {figures.kl:.4f}" for name, figures in cell.texts.items() if figures.kl is not None)
        seconds = "" if cell.seconds is None else f", {cell.seconds:.1f} s"
        print(f"{cell.method}, {cell.level}, seed {cell.seed}: {cell.error or told}{seconds}", flush=True)


def table(name: str, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of one model's table: a row per method, KL in / out at each level, the best of a level bold."""
    rows = [row for row in means_of(cells) if row.cell.method != "original"]
    levels = list(dict.fromkeys(row.cell.level for row in rows))
    found = {(row.cell.method, row.cell.level): row for row in rows}
    yield f"| {name} | {' | '.join(levels)} | seconds |"
    yield f"|---|{'---:|' * (len(levels) + 1)}"
    for method in dict.fromkeys(row.cell.method for row in rows):
        own = [found.get((method, level)) for level in levels]
        seconds = [row.cell.seconds for row in own if row and row.cell.seconds is not None]
        mean = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
        yield f"| {method} | {' | '.join(map(_told, own))} | {mean} |"


def _told(row: Row | None) -> str:
    if row is None or not row.draws:
        return "-"
    first, *others = [figures.kl for figures in row.cell.texts.values()]
    spread = "" if row.spread is None else f" ± {row.spread:.4f}"
    return " / ".join([f"{first:.4f}{spread}", *(f"{value:.4f}" for value in others)])


def main() -> None:
    """Measure what is not in the output, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder that holds the models")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparisons, one for each model")
    parser.add_argument("--methods", default="all", help="presets with commas, or all (default %(default)s)")
    parser.add_argument("--experts", type=float, nargs="*", default=[0.75, 0.5, 0.25], help="shares of the experts")
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.5, 0.25], help="shares whose bytes are sizes")
    parser.add_argument("--bits", type=int, help="bits a weight of experts, beside every method")
    parser.add_argument("--sizes-in", type=int, help="bits a weight of the experts whose bytes are sizes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="draws of rows (default %(default)s)")
    parser.add_argument("--subject", default="", help="part of the names of the models to measure (default all)")
    parser.add_argument("--rows", type=int, default=180, help="calibration rows (default %(default)s)")
    parser.add_argument("--judge-rows", type=int, default=96, help="rows of a text that judge (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the models are (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for subject in (subject for subject in SUBJECTS if arguments.subject in subject.folder):
        cells = list(compared(subject, arguments))
        print("", *table(subject.folder, cells), sep="\n", flush=True)


if __name__ == "__main__":
    main()
