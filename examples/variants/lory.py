"""Trains a dense model, the same with softly merged experts, and one routed token by token; merges both for prompts.

All three begin with the same dense warm-up, and are trained for the same number of steps in all.

python examples/variants/lory.py --text ONE.txt OTHER.txt
"""

import copy
import math
import time
from typing import Any

import torch
from common import LENGTH, dense, parser, perplexity, rows, table, train
from transformers import MixtralForCausalLM, PreTrainedModel

from hf_mcsmoe.variants import merge_for_prompt, soft_merge, upcycle_dense

EXPERTS, SEGMENT, WIDTH = 8, 16, 128
# The half of a row that is the prompt; the loss is judged on the other half.
PROMPT = LENGTH // 2


class Bytes:
    """Each character of Latin-1 is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        """Return the tokens of a text, [1, S]."""
        return {"input_ids": torch.tensor([list(text.encode("latin-1"))])}


def text_of(row: torch.Tensor) -> str:
    """Return the text whose tokens a row holds."""
    return bytes(row.tolist()).decode("latin-1")


@torch.no_grad()
def continued(model: PreTrainedModel, row: torch.Tensor) -> float:
    """Return the loss of a model on the second half of a row, after the first."""
    logits = model(input_ids=row[None]).logits[0, PROMPT - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, row[PROMPT:]).item()


def halves(model: PreTrainedModel, judged: torch.Tensor) -> float:
    """Return the perplexity of second halves."""
    return math.exp(sum(continued(model, row) for row in judged) / len(judged))


def averaged(model: MixtralForCausalLM) -> PreTrainedModel:
    """Return the model with the plain mean of its experts in every place, whatever a prompt says."""
    even = copy.deepcopy(model)
    for layer in even.model.layers:
        layer.mlp.gate.weight.data.zero_()
    return merge_for_prompt(even, "any", Bytes())


def judge(model: Any, judged: torch.Tensor) -> list[float]:
    """Return perplexities of second halves: by the model, and merged for the prompt, for another or by the mean."""
    merged = [merge_for_prompt(model, text_of(row[:PROMPT]), Bytes()) for row in judged]
    others, mean = merged[len(merged) // 2 :] + merged[: len(merged) // 2], averaged(model)
    pairs = [(row[None], *both) for row, *both in zip(judged, merged, others, strict=True)]
    chosen = [[halves(own, row) for row, own, _ in pairs], [halves(other, row) for row, _, other in pairs]]
    return [
        halves(model, judged),
        *(math.exp(sum(map(math.log, each)) / len(each)) for each in chosen),
        halves(mean, judged),
    ]


def main() -> None:
    """Train every arm with every seed."""
    options = parser(__doc__).parse_args()
    options.warm_up = max(options.steps // 20, 1)
    data = [rows(path, (0, 0.9)) for path in options.text]
    fewest = min(map(len, data))
    union = torch.cat([part[:fewest] for part in data])
    judged = torch.cat([rows(path, (0.9, 1))[:32] for path in options.text])
    lines, merged = [], []
    for seed in options.seeds:
        first, rest = copy.copy(options), copy.copy(options)
        first.steps, rest.steps = options.warm_up, options.steps - options.warm_up
        ancestor = train(dense(seed, WIDTH), union, first, seed)
        copies = [ancestor] * EXPERTS
        arms: dict[str, PreTrainedModel] = {
            "dense": copy.deepcopy(ancestor),
            "merged softly": soft_merge(upcycle_dense(copies, "mixtral"), segment_length=SEGMENT),
            "routed by token, top-2": upcycle_dense(copies, "mixtral", top_k=2),
        }
        for name, model in arms.items():
            start = time.perf_counter()
            train(model, union, rest, seed + 1)
            seconds = time.perf_counter() - start
            lines.append([seed, name, perplexity(model, judged), f"{seconds:.0f}"])
            merged.append(
                [seed, name, *(judge(model, judged) if name != "dense" else [halves(model, judged), "", "", ""])]
            )
    table(["seed", "trained", "perplexity", "seconds"], lines)
    print()
    table(
        ["seed", "second halves", "the model", "merged for the prompt", "for one of the other text", "plain mean"],
        merged,
    )


if __name__ == "__main__":
    main()
