"""Time and executed operations of a layer stored as low rank + sparse, as ratios to the merged one and the original.

A Switch layer of base size (D 768, F 3072, 32 experts merged into 8; rank 32, a tenth of the rows of S kept). Weights
and inputs are random: neither time nor operations depend on them.

python examples/benchmarks/compact_forward.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import Row, compare, parser, print_table, switch
from merged_forward import SIZES, first_blocks, inputs, merge
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts
from hf_mcsmoe.modeling.forward_mcsmoe import eager_experts_forward, grouped_experts_forward

AIM = 0.35


def main() -> None:
    """Print a table with the rows per size of input."""
    print_table(measure(parser(__doc__, repetitions=15).parse_args()))


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios of the layers."""
    torch.set_num_threads(arguments.threads)
    model = switch(2, dtype=arguments.dtype)
    merged, small = merge(model, experts=8), merge(model, experts=8)
    # Any factors serve to measure the time.
    config = LoSparseConfig(
        rank=32, keep=0.1, factorisation=lambda weight, rank, *_: (weight[:, :rank], weight[:rank])
    )
    compact(decompose_experts(small, config, prune=True))
    original, dense, ours = first_blocks(model, merged, small)
    rows = []
    for size in SIZES:
        rows += _rows(size, inputs(model, size), original, dense, ours, arguments)
    claimed = (32 + 0.1 * 768 * 3072 / (768 + 3072)) * (768 + 3072) / (768 * 3072)
    return [*rows, Row("operations of an expert by the formula, rank 32, keep 0.1", claimed)]


def _rows(
    size: tuple[int, int],
    hidden: torch.Tensor,
    original: nn.Module,
    dense: nn.Module,
    ours: nn.Module,
    arguments: argparse.Namespace,
) -> list[Row]:
    def run(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(hidden)

    label = f"{size[0]} x {size[1]} tokens"
    share = flops(ours, hidden) / flops(original, hidden)
    return [
        compare(f"compact / original layer, {label}", run(ours), run(original), arguments, AIM),
        compare(f"compact / merged layer, {label}", run(ours), run(dense), arguments),
        Row(f"executed operations, compact / original layer, {label}", share),
        compare(f"experts by grouped products / one after another, {label}", *_products(ours, hidden), arguments),
    ]


def _products(block: nn.Module, hidden: torch.Tensor) -> list[Callable[[], object]]:
    """Return the two ways to compute a block's experts: as under torch.compile and on accelerators, and as here."""
    experts: Any = block.experts
    states = hidden.flatten(0, 1)
    index = torch.arange(len(states))[:, None] % experts.num_experts
    arguments = (experts, states, index, torch.ones_like(index, dtype=states.dtype))
    return [lambda: grouped_experts_forward(*arguments), lambda: eager_experts_forward(*arguments)]


def flops(layer: nn.Module, hidden: torch.Tensor) -> int:
    """Return the floating-point operations that a forward executes in matrix products."""
    with FlopCounterMode(display=False) as counter:
        layer(hidden)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
