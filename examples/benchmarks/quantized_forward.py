"""Time merged experts in 8, 4, 3 and 2 bits against the same experts in float32: ratios within one run.

Run: python examples/benchmarks/quantized_forward.py [--hidden-size 2048 --width 1024 --experts 16 --top-k 2]
"""

import argparse
import copy
import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.quantization.layer import round_experts
from hf_mcsmoe.quantization.packing import store_codes

ROUNDS, TOKENS = 5, (1, 8, 64, 4096)


def build(options: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """Make a random model of one layer, merged to half of its experts."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=options.hidden_size,
        moe_intermediate_size=options.width,
        num_hidden_layers=1,
        num_experts=2 * options.experts,
        num_experts_per_tok=options.top_k,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(512, (8, 64))}]
    return merge_experts(model, plan_merge(model, collect_statistics(model, batches), MergeConfig(experts=0.5)))


def quantized(model: Qwen3MoeForCausalLM, bits: int, group_size: int) -> Qwen3MoeForCausalLM:
    """Return a copy of the model in few bits."""
    model, grid = copy.deepcopy(model), Grid(bits, group_size)
    for layer in moe_layers(model):
        experts = decomposable(layer.container)
        for name, codes in round_experts(experts, grid, grid).items():
            store_codes(experts, name, codes)
    return model


@torch.no_grad()
def seconds(model: Qwen3MoeForCausalLM, tokens: int) -> float:
    """Return the processor time of the model on some tokens, in rows of up to 128."""
    ids = torch.arange(tokens).remainder(512).view(-1, min(tokens, 128))
    started = time.process_time()
    model(input_ids=ids, use_cache=False)
    return time.process_time() - started


def main() -> None:
    """Print, for each number of bits and of tokens, the time over that of float32: the fastest of some rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden-size": 2048, "width": 1024, "experts": 16, "top-k": 2, "group-size": 64, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = build(options)
    models = {"float32": dense} | {f"{bits} bits": quantized(dense, bits, options.group_size) for bits in (8, 4, 3, 2)}
    print("tokens  " + "  ".join(f"{name:>7}" for name in models))
    for tokens in TOKENS:
        best = dict.fromkeys(models, float("inf"))
        for _ in range(ROUNDS):
            for name, model in models.items():
                best[name] = min(best[name], seconds(model, tokens))
        print(f"{tokens:6}  " + "  ".join(f"{time / best['float32']:7.2f}" for time in best.values()), flush=True)


if __name__ == "__main__":
    main()
