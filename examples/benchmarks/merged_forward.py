"""Time of a merged layer, and of a whole merged model, as a ratio to the original, at few and at many tokens.

A Switch layer of base size (D 768, F 3072, 32 experts merged into 8) and one of the Qwen3-MoE kind (64 experts, 8 per
per token, merged into 32). Weights and inputs are random, so tokens spread evenly over the original's experts. The row
"one dense expert" is what no merged top-1 layer can beat: all tokens through a single expert without any routing.

python examples/benchmarks/merged_forward.py
"""

import argparse
from collections.abc import Callable

import torch
from common import Row, compare, parser, print_table, qwen3_moe, switch, text
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, moe_layers, plan_merge

SIZES = ((1, 128), (32, 128))
SWITCH_AIMS = {(1, 128): 0.4, (32, 128): 0.7}
NEVER_SLOWER = 1.0


def main() -> None:
    """Print a table with a row per layer or model and size of input."""
    options = parser(__doc__, repetitions=15)
    options.add_argument("--experts-implementation", help="of the interface family (default: the model's own)")
    print_table(measure(options.parse_args()))


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios of layers and models, for both families and both sizes."""
    torch.set_num_threads(arguments.threads)
    return _switch_rows(arguments) + _interface_rows(arguments)


def _switch_rows(arguments: argparse.Namespace) -> list[Row]:
    model = switch(2, dtype=arguments.dtype)
    merged = merge(model, experts=8)
    original, ours = first_blocks(model, merged)
    dense = original.experts["expert_0"]
    rows = []
    for size in SIZES:
        hidden = inputs(model, size)
        label = f"{size[0]} x {size[1]} tokens"
        rows += [
            _compare(f"Switch layer, 32 -> 8 experts, {label}", ours, original, hidden, arguments, SWITCH_AIMS[size]),
            _compare(f"(one dense expert / Switch layer, {label})", dense, original, hidden, arguments, None),
        ]
    return [*rows, _whole(f"Switch model, {label_of(model)}", merged, model, arguments)]


def _interface_rows(arguments: argparse.Namespace) -> list[Row]:
    model = qwen3_moe(2, dtype=arguments.dtype)
    if arguments.experts_implementation:
        model.set_experts_implementation(arguments.experts_implementation)
    merged = merge(model, experts=32)
    original, ours = first_blocks(model, merged)
    rows = [
        _compare(
            f"Qwen3-MoE layer, 64 -> 32 experts, {size[0]} x {size[1]} tokens",
            ours,
            original,
            inputs(model, size),
            arguments,
            NEVER_SLOWER,
        )
        for size in SIZES
    ]
    return [*rows, _whole(f"Qwen3-MoE model, {label_of(model)}", merged, model, arguments)]


def merge(model: PreTrainedModel, experts: int) -> PreTrainedModel:
    """Return the model with `experts` experts in each layer. Alignment, which no forward can tell, is left out."""
    statistics = collect_statistics(model, text(model, 1, 8, 128))
    config = MergeConfig(experts=experts, budget="uniform", alignment="none")
    return merge_experts(model, plan_merge(model, statistics, config))


def first_blocks(*models: PreTrainedModel) -> list[nn.Module]:
    """Return the first sparse block (router and experts) of each model."""
    return [model.get_submodule(moe_layers(models[0])[0].name.rpartition(".")[0]) for model in models]


def inputs(model: PreTrainedModel, size: tuple[int, int]) -> torch.Tensor:
    """Return normalised random hidden states [batch, length, D]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*size, model.config.hidden_size, generator=generator).to(model.dtype)


def label_of(model: PreTrainedModel) -> str:
    """Return the size of a whole model and of its input in words."""
    return f"{model.num_parameters() / 1e6:.0f} M parameters, 4 x 128 tokens"


def _compare(
    measure: str,
    ours: Callable[..., object],
    original: Callable[..., object],
    hidden: torch.Tensor,
    arguments: argparse.Namespace,
    aim: float | None,
) -> Row:
    return compare(f"forward, {measure}", lambda: ours(hidden), lambda: original(hidden), arguments, aim)


def _whole(measure: str, ours: PreTrainedModel, original: PreTrainedModel, arguments: argparse.Namespace) -> Row:
    batch = text(original, 1, 4, 128)[0]
    return compare(f"forward, {measure}", lambda: ours(**batch), lambda: original(**batch), arguments, NEVER_SLOWER)


if __name__ == "__main__":
    main()
