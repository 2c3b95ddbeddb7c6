"""Trains a dense model, two branches of it on two texts, and their mixture; prints the perplexities on both texts.

python examples/variants/upcycling.py --text ONE.txt OTHER.txt --attention average mixture shared_kv
"""

import copy

import torch
from common import dense, parser, perplexity, rows, table, train

from hf_mcsmoe.variants import upcycle_dense

NAMES = {"average": "mixture", "mixture": "mixture, attention mixed", "shared_kv": "mixture, keys and values shared"}


def main() -> None:
    """Train with every seed."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--attention",
        nargs="+",
        choices=list(NAMES),
        default=["average"],
        help="what becomes of the branches' attention",
    )
    options = arguments.parse_args()
    if len(options.text) != 2:
        raise SystemExit("Give two files of text, one for each branch.")
    halves = [rows(path, (0, 0.9)) for path in options.text]
    judged = [rows(path, (0.9, 1)) for path in options.text]
    both = halves[0][: len(halves[1])], halves[1][: len(halves[0])]
    union, lines = torch.cat(both), []
    for seed in options.seeds:
        ancestor = train(dense(seed), union, options, seed)
        branches = [train(copy.deepcopy(ancestor), half, options, seed + 1) for half in halves]
        models = {"ancestor": copy.deepcopy(ancestor), "branch 1": branches[0], "branch 2": branches[1]}
        for kind in options.attention:
            mixture = upcycle_dense(branches, "mixtral", top_k=2, attention=kind)
            models[f"{NAMES[kind]}, untrained"] = mixture
            models[f"{NAMES[kind]}, trained"] = train(copy.deepcopy(mixture), union, options, seed + 2)
        longer = train(train(ancestor, union, options, seed + 1), union, options, seed + 2)
        models["ancestor, trained as long"] = longer
        lines += [[seed, name, *(perplexity(model, text) for text in judged)] for name, model in models.items()]
    table(
        ["seed", "model", *(path.name for path in options.text), "mean"],
        [[*line, sum(line[2:]) / 2] for line in lines],
    )


if __name__ == "__main__":
    main()
