"""Trains small Mixture-of-Experts models with momentum across depth, without, and with its scales alone.

python examples/variants/momentum.py --text TEXT.txt
"""

import copy

from common import parser, perplexity, rows, sparse, table, train

from hf_mcsmoe.variants import add_momentum, set_momentum

MU = 0.7


def main() -> None:
    """Train every arm with every seed, and add momentum to the trained model without further training."""
    options = parser(__doc__).parse_args()
    data, judged = rows(options.text[0], (0, 0.9)), rows(options.text[0], (0.9, 1))
    lines, patched = [], []
    for seed in options.seeds:
        base = train(sparse(seed, layers=4), data, options, seed)
        figures = [perplexity(base, judged)]
        for kind in ("momentum", "scale"):
            model = add_momentum(sparse(seed, layers=4), 0.0 if kind == "momentum" else MU, kind=kind)
            if kind == "momentum":
                set_momentum(model, mu=MU)
            figures.append(perplexity(train(model, data, options, seed), judged))
        lines.append([seed, *figures])
        model = add_momentum(copy.deepcopy(base), 0.0)
        found = []
        for mu in (0.1, 0.3, 0.7):
            set_momentum(model, mu=mu)
            found.append(f"{perplexity(model, judged) / figures[0] - 1:+.1%}")
        patched.append([seed, *found])
    table(["seed", "plain", f"momentum {MU}", "scales alone"], lines)
    print()
    table(["seed", "added untrained: mu = 0.1", "0.3", "0.7"], patched)


if __name__ == "__main__":
    main()
