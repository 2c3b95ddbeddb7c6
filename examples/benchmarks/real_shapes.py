"""Tokens a second and memory of a sparse layer of real shape: as it is, merged, low rank + sparse, and in 4 bits.

    python examples/benchmarks/real_shapes.py --device cuda --dtype bfloat16

Shapes: a layer of switch-base-32, of Mixtral-8x7B and of Qwen3-30B-A3B, with random weights; half of the experts stay.
Held: what the layer's weights take. Beside it: what a forward takes more at its peak, where the device counts it.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from common import parser, qwen3_moe, random_weights, seconds, switch
from merged_forward import first_blocks, merge
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_mcsmoe import LoSparseConfig, compact, decompose_experts, moe_layers
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.quantization.layer import round_experts
from hf_mcsmoe.quantization.packing import store_codes

TOKENS = (8, 4096)
BITS = Grid(4, 128)


def mixtral(dtype: str) -> PreTrainedModel:
    """Return one layer of Mixtral-8x7B."""
    return random_weights(MixtralForCausalLM, MixtralConfig(vocab_size=512, num_hidden_layers=1), dtype)


def qwen3_30b(dtype: str) -> PreTrainedModel:
    """Return one layer of Qwen3-30B-A3B."""
    return qwen3_moe(1, num_experts=128, hidden_size=2048, dtype=dtype)


SHAPES: dict[str, Callable[[str], PreTrainedModel]] = {
    "switch-base-32": lambda dtype: switch(2, dtype=dtype),
    "Mixtral-8x7B": mixtral,
    "Qwen3-30B-A3B": qwen3_30b,
}


def low_rank(model: PreTrainedModel) -> PreTrainedModel:
    """Return a merged model stored as low rank + sparse; time depends on no value, so any factors serve."""
    config = LoSparseConfig(
        rank=32, keep=0.1, factorisation=lambda weight, rank, *_: (weight[:, :rank], weight[:rank])
    )
    model = copy.deepcopy(model)
    compact(decompose_experts(model, config, prune=True))
    return model


def in_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Return a merged model in few bits."""
    model = copy.deepcopy(model)
    for layer in moe_layers(model):
        experts = decomposable(layer.container)
        for name, codes in round_experts(experts, BITS, BITS).items():
            store_codes(experts, name, codes)
    return model


@torch.no_grad()
def rows_of(name: str, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each form of a layer."""
    with torch.device(arguments.device):
        original = SHAPES[name](arguments.dtype)
    merged = merge(original, experts=moe_layers(original)[0].num_experts // 2)
    models = {"original": original, "merged": merged, "low rank": low_rank(merged), "4 bits": in_bits(merged)}
    base: list[float] = []
    for form, block in zip(models, first_blocks(*models.values()), strict=True):
        times = [time_of(block, original.config.hidden_size, tokens, arguments) for tokens in TOKENS]
        base = base or times
        speeds = [
            f"{tokens / time:,.0f} ({first / time:.2f})"
            for tokens, time, first in zip(TOKENS, times, base, strict=True)
        ]
        held = sum(tensor.nbytes for tensor in [*block.parameters(), *block.buffers()])
        beside = peak(block, original.config.hidden_size, arguments)
        yield f"| {name}, {form} | {' | '.join(speeds)} | {held / 1e6:,.0f} MB | {beside} |"


def inputs(hidden_size: int, tokens: int, arguments: argparse.Namespace) -> torch.Tensor:
    """Return random hidden states [1, tokens, D]."""
    dtype = getattr(torch, arguments.dtype)
    return torch.randn(1, tokens, hidden_size, device=arguments.device, dtype=dtype)


def time_of(block: nn.Module, hidden_size: int, tokens: int, arguments: argparse.Namespace) -> float:
    """Return the median time of a forward, in seconds."""
    hidden = inputs(hidden_size, tokens, arguments)

    def call() -> None:
        block(hidden)
        if hidden.is_cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    return statistics.median(seconds(call) for _ in range(arguments.repetitions))


def peak(block: nn.Module, hidden_size: int, arguments: argparse.Namespace) -> str:
    """Return what a forward of the most tokens takes beyond what is held, where the device counts it."""
    if not arguments.device.startswith("cuda"):
        return "-"
    hidden = inputs(hidden_size, TOKENS[-1], arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block(hidden)
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f} MB"


def main() -> None:
    """Print one table."""
    options = parser(__doc__, repetitions=20)
    options.add_argument("--device", default="cpu", help="where the layers are (default %(default)s)")
    options.add_argument("--shape", choices=list(SHAPES), help="only this one")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = [f"tokens/s of {tokens} (times the original's)" for tokens in TOKENS]
    print(f"| layer | {' | '.join(heads)} | held | beside it |", "|---|---:|---:|---:|---:|", sep="\n")
    for name in [arguments.shape] if arguments.shape else SHAPES:
        print(*rows_of(name, arguments), sep="\n", flush=True)


if __name__ == "__main__":
    main()
