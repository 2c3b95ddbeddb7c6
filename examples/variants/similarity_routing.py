"""Trains small models with plain, similarity-aware and attention-aware routers, and compares how steady they route.

python examples/variants/similarity_routing.py --text TEXT.txt

The last sixth of the training lies between the two checkpoints whose first choices are compared, on held-out text. The
entropies, in nats, are of a token's distribution over experts before the top-k: of the router's own probabilities p,
and of their average r over tokens, by which experts are picked; means over tokens and layers at the end of training.
The last column says how alike the choices are: the share of a layer's tokens that choose its most chosen expert first.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import parser, perplexity, rows, sparse, table, train
from transformers import PreTrainedModel

from hf_mcsmoe.variants import add_attention_routing, add_similarity_routing

TAU, SIGMA, JUDGED = 0.1, 1.0, 64


def eager(seed: int) -> PreTrainedModel:
    """Return a small model whose attention returns its weights."""
    model = sparse(seed)
    model.set_attn_implementation("eager")
    return model


ARMS: dict[str, Callable[[int], PreTrainedModel]] = {
    "plain": sparse,
    f"similarity, tau {TAU}": lambda seed: add_similarity_routing(sparse(seed), TAU),
    f"attention, sigma {SIGMA}": lambda seed: add_attention_routing(eager(seed), SIGMA),
}


@torch.no_grad()
def distributions(model: PreTrainedModel, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p and r of all tokens in all layers, [layers, T, E]."""
    inputs: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for gate in gates]
    output = model(input_ids=data[:JUDGED], output_router_logits=True)
    for hook in hooks:
        hook.remove()
    own = [(seen @ gate.weight.T).softmax(-1) for seen, gate in zip(inputs, gates, strict=True)]
    return torch.stack(own), torch.stack(output.router_logits).softmax(-1)


def entropy(shares: torch.Tensor) -> float:
    """Return the mean entropy of distributions, in nats."""
    return float(torch.special.entr(shares).sum(-1).mean())


def measure(seed: int, name: str, options: Any, data: torch.Tensor, judged: torch.Tensor) -> list[Any]:
    """Train an arm, and return its line of the table."""
    early: list[PreTrainedModel] = []
    model = ARMS[name](seed)

    def keep(step: int) -> None:
        if step == options.steps - options.steps // 6:
            early.append(copy.deepcopy(model).eval())

    train(model, data, options, seed, keep)
    (_, before), (own, after) = (distributions(state, judged) for state in (early[0], model))
    moved = float((before.argmax(-1) != after.argmax(-1)).float().mean())
    most = float(torch.stack([first.bincount().max() / len(first) for first in after.argmax(-1)]).mean())
    return [seed, name, perplexity(model, judged), f"{moved:.1%}", entropy(own), entropy(after), f"{most:.0%}"]


def main() -> None:
    """Train every arm with every seed."""
    options = parser(__doc__).parse_args()
    data, judged = rows(options.text[0], (0, 0.9)), rows(options.text[0], (0.9, 1))
    lines = [measure(seed, name, options, data, judged) for seed in options.seeds for name in ARMS]
    table(["seed", "routers", "perplexity", "changed", "entropy of p", "entropy of r", "most chosen"], lines)


if __name__ == "__main__":
    main()
