"""Trains dense-size SMoEs with frozen random routers, k growing or fixed, and prints the perplexity of every k.

python examples/variants/smoe_dropout.py --text TEXT.txt
"""

from common import dense, parser, perplexity, rows, table, train

from hf_mcsmoe.variants import ElasticTopK, moefy_dense, set_top_k

EXPERTS, KS = 8, (1, 2, 4, 8)
# The least and the most k of a training; None trains the dense model.
ARMS = {"dense": None, "k grows 1 to 8": (1, 8), "k = 2": (2, 2), "k = 8": (8, 8)}


def main() -> None:
    """Train every arm with every seed."""
    options = parser(__doc__).parse_args()
    data, judged = rows(options.text[0], (0, 0.9)), rows(options.text[0], (0.9, 1))
    lines = []
    for seed in options.seeds:
        for name, ks in ARMS.items():
            model = dense(seed)
            if ks is None:
                lines.append(
                    [seed, name, *[""] * (len(KS) - 1), perplexity(train(model, data, options, seed), judged)]
                )
                continue
            moefy_dense(model, EXPERTS, seed=seed)
            schedule = ElasticTopK(*ks)
            train(model, data, options, seed, lambda step: set_top_k(model, schedule.k_at(step, options.steps)))  # noqa: B023
            found = []
            for k in KS:
                set_top_k(model, k)
                found.append(perplexity(model, judged))
            lines.append([seed, name, *found])
    table(["seed", "trained", *(f"k = {k}" for k in KS)], lines)


if __name__ == "__main__":
    main()
