"""The divergence that a search for a size predicts, against the one that is measured, over a ladder of sizes.

    python examples/benchmarks/predicted_effect.py MODEL --text FILE --sizes 0.5 0.35 0.25 0.2

Rows of the first half of each text calibrate. Those of the second halves judge ("in"), and of the texts named by
--out, which were not calibrated on ("out"). What choices cost is measured once, for all sizes. KL: nats per token that
counts; the model of each size is what its curves predict to be best, without a check on held-out rows.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from divergence import figures, predictions
from quality_ladder import batches_of, rows_of
from transformers.utils import logging

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.search.size import bytes_text

logging.disable_progress_bar()


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table, each as soon as it is measured.

    Raises:
        ValueError: a size that cannot be reached; the message says which is the smallest.
    """
    folder = arguments.model
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    rows, drawn = rows_of(tokenizer, arguments.text, tuple(arguments.out), arguments.max_length), random.Random(0)
    numbers = {name: arguments.rows if name == "fit" else arguments.judge_rows for name in rows}
    batches = {
        name: batches_of(model, tokenizer, drawn.sample(part, min(numbers[name], len(part))))
        for name, part in rows.items()
    }
    calibration = batches.pop("fit")
    references = {name: predictions(model, part) for name, part in batches.items()}
    searches = [SizeConfig(size, reduce=arguments.reduce) for size in arguments.sizes]
    statistics = collect_statistics(model, calibration, needs_of(MergeConfig(), searches[0]))
    yield (
        f"| {folder.name} | bytes | taken | predicted KL | "
        + " | ".join(f"KL, {name} | predicted / {name}" for name in batches)
        + " |"
    )
    yield f"|{'---|' * 3}{'---:|' * (1 + 2 * len(batches))}"
    for search in searches:
        student = compress(model, calibration, statistics=statistics, size=search)
        size = record_of(student).size
        measured = [figures(student, part, references[name])[1] for name, part in batches.items()]
        cells = [f"{cell:.3g} | {size.predicted_kl / cell:.2f}" for cell in measured]
        told = [str(search.size), bytes_text(size.planned), size.method, f"{size.predicted_kl:.3g}", *cells]
        yield f"| {' | '.join(told)} |"


def main() -> None:
    """Print a markdown table: a row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--text", type=Path, required=True, help="text, or a JSON object of texts by name")
    parser.add_argument("--out", nargs="*", default=[], help="texts, by name, that are not calibrated on")
    parser.add_argument("--sizes", nargs="+", default=["0.5", "0.35", "0.25"], help="as for `hf-mcsmoe compress`")
    parser.add_argument("--reduce", default="auto", help="auto, merge or prune (default %(default)s)")
    parser.add_argument("--rows", type=int, default=180, help="calibration rows (default %(default)s)")
    parser.add_argument("--judge-rows", type=int, default=96, help="rows that judge (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for line in lines(arguments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
