"""Time of `collect_statistics` as a ratio to a plain forward pass over the same batches.

    python examples/benchmarks/statistics_pass.py
    python examples/benchmarks/statistics_pass.py --each

Rows: what a merge by default reads, what `hf-mcsmoe calibrate` collects by default, and with --each every statistic by
itself. Those that read gradients run a backward pass as well.
"""

import argparse

import torch
from common import Row, compare, parser, print_table, qwen3_moe, switch, text
from transformers import PreTrainedModel

from hf_mcsmoe import collect_statistics
from hf_mcsmoe.methods.statistics import STATISTICS, of_data

AIM, AIM_OF_ALL = 1.05, 1.1


def main() -> None:
    """Print a table with one row per model."""
    options = parser(__doc__, repetitions=11)
    options.add_argument("--layers", type=int, default=2, help="layers of a model's side (default %(default)s)")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=128, help="tokens of a text (default %(default)s)")
    options.add_argument("--batches", type=int, default=2, help="batches of a pass (default %(default)s)")
    options.add_argument("--each", action="store_true", help="also measure every statistic by itself")
    print_table(measure(options.parse_args()))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios for a Switch and a Qwen3-MoE model."""
    torch.set_num_threads(arguments.threads)
    layers, dtype = arguments.layers, arguments.dtype
    return [
        *_rows("Switch (D 768, F 3072, 32 experts, top-1)", switch(layers, dtype=dtype), arguments),
        *_rows("Qwen3-MoE (D 512, 64 experts, top-8)", qwen3_moe(layers, dtype=dtype), arguments),
    ]


def _rows(name: str, model: PreTrainedModel, arguments: argparse.Namespace) -> list[Row]:
    free = [name for name in of_data(STATISTICS) if not STATISTICS.find(name).products]
    measures: dict[str, tuple[list[str] | None, float | None]] = {
        "statistics pass": (None, AIM),
        f"all {len(free)} sums without a product": (free, AIM_OF_ALL),
    }
    if arguments.each:
        measures |= {f"statistic {item}": ([item], None) for item in of_data(STATISTICS)}
    batches = text(model, arguments.batches, arguments.batch_size, arguments.length)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    def row(told: str, needs: list[str] | None, aim: float | None) -> Row:
        def collect() -> None:
            collect_statistics(model, batches, needs)

        return compare(f"{told} / forward pass, {name}", collect, forward, arguments, aim)

    return [row(told, *measured) for told, measured in measures.items()]


if __name__ == "__main__":
    main()
