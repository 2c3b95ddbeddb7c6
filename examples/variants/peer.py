"""Trains a dense model, and one with a PEER layer of as many active neurons in the middle, by two kinds of query.

python examples/variants/peer.py --text TEXT.txt
"""

import math
from typing import Any

import torch
from common import dense, parser, perplexity, rows, table, train
from transformers import PreTrainedModel

from hf_mcsmoe.variants import PEERLayer, swap_peer

EXPERTS, HEADS, TOP_K = 64**2, 8, 16
# Hidden units of the dense MLPs, as many as a token gets of the PEER layer.
WIDTH = HEADS * TOP_K
# Whether queries pass a BatchNorm; None trains the dense model.
ARMS = {"dense": None, "PEER": True, "PEER, no query BatchNorm": False}


@torch.no_grad()
def usage(model: PreTrainedModel, judged: torch.Tensor) -> tuple[float, str]:
    """Return the entropy of the experts' weights, summed over tokens, in nats, and the share of experts picked."""
    (layer,) = (module for module in model.modules() if isinstance(module, PEERLayer))
    seen: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(layer.retrieve(args[0].flatten(0, 1))))
    model(input_ids=judged)
    handle.remove()
    ((scores, index),) = seen
    summed = torch.zeros(EXPERTS).index_add(0, index.flatten(), scores.softmax(dim=-1).flatten())
    share = summed / summed.sum()
    return float(torch.special.entr(share).sum()), f"{(summed > 0).float().mean():.1%}"


def main() -> None:
    """Train every arm with every seed."""
    options = parser(__doc__).parse_args()
    data, judged = rows(options.text[0], (0, 0.9)), rows(options.text[0], (0.9, 1))[:256]
    lines = []
    for seed in options.seeds:
        for name, query_batch_norm in ARMS.items():
            model: PreTrainedModel = dense(seed, WIDTH)
            if query_batch_norm is not None:
                sizes = {"num_experts": EXPERTS, "heads": HEADS, "top_k": TOP_K, "key_size": 64}
                swap_peer(model, **sizes, query_batch_norm=query_batch_norm)
            train(model, data, options, seed)
            used = ("", "") if query_batch_norm is None else usage(model, judged)
            found = perplexity(model, judged, len(judged))
            # In training mode, which the running statistics lag behind.
            own = perplexity(model.train(), judged, len(judged)) if query_batch_norm else ""
            lines.append([seed, name, found, own, *used])
    use = f"entropy of use (at most {math.log(EXPERTS):.3f})"
    table(["seed", "trained", "perplexity", "by the rows' statistics", use, "used"], lines)


if __name__ == "__main__":
    main()
