"""Time of `collect_statistics` as a ratio to a plain forward pass over the same batches.

python examples/benchmarks/statistics_pass.py
"""

import argparse

import torch
from common import Row, compare, parser, print_table, qwen3_moe, switch, text
from transformers import PreTrainedModel

from hf_mcsmoe import collect_statistics

AIM = 1.05


def main() -> None:
    """Print a table with one row per model."""
    options = parser(__doc__, repetitions=11)
    options.add_argument("--layers", type=int, default=2, help="layers of a model's side (default %(default)s)")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--length", type=int, default=128, help="tokens of a text (default %(default)s)")
    options.add_argument("--batches", type=int, default=2, help="batches of a pass (default %(default)s)")
    print_table(measure(options.parse_args()))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios for a Switch and a Qwen3-MoE model."""
    torch.set_num_threads(arguments.threads)
    layers, dtype = arguments.layers, arguments.dtype
    return [
        _row("Switch (D 768, F 3072, 32 experts, top-1)", switch(layers, dtype=dtype), arguments),
        _row("Qwen3-MoE (D 512, 64 experts, top-8)", qwen3_moe(layers, dtype=dtype), arguments),
    ]


def _row(name: str, model: PreTrainedModel, arguments: argparse.Namespace) -> Row:
    batches = text(model, arguments.batches, arguments.batch_size, arguments.length)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    def collect() -> None:
        collect_statistics(model, batches)

    return compare(f"statistics pass / forward pass, {name}", collect, forward, arguments, AIM)


if __name__ == "__main__":
    main()
