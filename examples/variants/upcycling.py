"""Trains a dense model, two branches of it on two texts, and their mixture; prints the perplexities on both texts.

python examples/variants/upcycling.py --text ONE.txt OTHER.txt
"""

import copy

import torch
from common import dense, parser, perplexity, rows, table, train

from hf_mcsmoe.variants import upcycle_dense


def main() -> None:
    """Train with every seed."""
    options = parser(__doc__).parse_args()
    if len(options.text) != 2:
        raise SystemExit("Give two files of text, one for each branch.")
    halves = [rows(path, (0, 0.9)) for path in options.text]
    judged = [rows(path, (0.9, 1)) for path in options.text]
    both = halves[0][: len(halves[1])], halves[1][: len(halves[0])]
    union, lines = torch.cat(both), []
    for seed in options.seeds:
        ancestor = train(dense(seed), union, options, seed)
        branches = [train(copy.deepcopy(ancestor), half, options, seed + 1) for half in halves]
        mixture = upcycle_dense(branches, "mixtral", top_k=2)
        models = {
            "ancestor": ancestor,
            "branch 1": branches[0],
            "branch 2": branches[1],
            "mixture, untrained": mixture,
        }
        for name, model in models.items():
            lines.append([seed, name, *(perplexity(model, text) for text in judged)])
        trained = train(copy.deepcopy(mixture), union, options, seed + 2)
        longer = train(train(ancestor, union, options, seed + 1), union, options, seed + 2)
        for name, model in {"mixture, trained": trained, "ancestor, trained as long": longer}.items():
            lines.append([seed, name, *(perplexity(model, text) for text in judged)])
    table(
        ["seed", "model", *(path.name for path in options.text), "mean"],
        [[*line, sum(line[2:]) / 2] for line in lines],
    )


if __name__ == "__main__":
    main()
