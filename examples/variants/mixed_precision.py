"""Prints what picks in low precision, or skipped ones, cost a trained model, and what its caches of experts load.

python examples/variants/mixed_precision.py MODEL --text TEXT.txt
"""

import argparse
import math
from pathlib import Path

import torch
from common import table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_mcsmoe.variants import hobbit, lfu, lru, mix_precision, next_layer_accuracy, record_trace, simulate

T1, T2 = 0.6, 0.9


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the perplexity per token on rows of tokens."""
    return math.exp(sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in ids) / len(ids))


def main() -> None:
    """Measure one model."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--group-size", type=int, default=32)
    given = options.parse_args()
    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: given.rows * given.length].view(-1, given.length)
    base = AutoModelForCausalLM.from_pretrained(given.model).eval()
    before, lines = perplexity(base, ids), []
    for name, bits in (("8 bits", 8), ("4 bits", 4), ("2 bits", 2), ("skipped", 0)):
        model = AutoModelForCausalLM.from_pretrained(given.model).eval()
        mix_precision(model, t1=T1, t2=1.0, bits=bits, group_size=given.group_size)
        lines.append([name, perplexity(model, ids), f"{perplexity(model, ids) / before - 1:+.2%}"])
    print(f"Perplexity {before:.3f}; picks beyond {T1} of a token's weight otherwise:\n")
    table(["picks beyond T1", "perplexity", "change"], lines)
    traces = [record_trace(base, {"input_ids": row[None]}) for row in ids]
    experts = len(traces[0].index) * base.config.num_experts
    costs = []
    for share in (0.25, 0.5):
        kept = int(experts * share)
        for name, priority in (("LRU", lru), ("LFU", lfu), ("HOBBIT", hobbit())):
            plain = simulate(traces, priority, high=kept)
            mixed = simulate(traces, priority, high=int(kept * 0.75), low=kept, t1=T1, t2=T2)
            costs.append([f"{share:.0%}", name, plain, mixed])
    print("\nExperts loaded a token, in bytes of one in high precision; caches of the same bytes:\n")
    table(["kept", "policy", "high precision alone", f"T1 {T1}, T2 {T2}"], costs)
    for ahead in (1, 2):
        found = next_layer_accuracy(base, {"input_ids": ids}, ahead)
        print(f"\nFirst expert predicted {ahead} ahead, by layer: {', '.join(f'{share:.2f}' for share in found)}")


if __name__ == "__main__":
    main()
