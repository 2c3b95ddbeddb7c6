"""Time of each grouping of 128 experts into 64 groups, as a ratio to one average linkage of the same in plain Python.

The rows of similarity are random: time depends on their number alone, up to the steps of k-means.

python examples/benchmarks/grouping.py
"""

import argparse
from functools import partial

import torch
from common import Row, compare, parser, print_table

from hf_mcsmoe.methods.grouping import GROUPING
from hf_mcsmoe.methods.view import LayerView, Sums

EXPERTS, GROUPS = 128, 64


def main() -> None:
    """Print a table with a row for each grouping."""
    print_table(measure(parser(__doc__, repetitions=3).parse_args()))


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Return the ratios of the groupings."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(EXPERTS, 16, generator=generator, dtype=torch.float64), dim=1)
    similarity, saliency = rows @ rows.T, torch.rand(EXPERTS, generator=generator)
    view = LayerView(Sums(), EXPERTS, 0, lambda: None)
    reference = partial(plain_linkage, similarity.tolist(), GROUPS)
    return [
        compare(
            f"{name}, {EXPERTS} experts / linkage in plain Python",
            partial(GROUPING[name], view, saliency, similarity, GROUPS),
            reference,
            arguments,
        )
        for name in GROUPING
    ]


def plain_linkage(similarity: list[list[float]], groups: int) -> list[list[int]]:
    """Merge the two clusters of the largest mean similarity until `groups` are left, each mean taken anew."""
    clusters = [[expert] for expert in range(len(similarity))]
    while len(clusters) > groups:
        best, pair = -float("inf"), (0, 0)
        for i, one in enumerate(clusters):
            for j in range(i):
                other = clusters[j]
                mean = sum(similarity[a][b] for a in one for b in other) / (len(one) * len(other))
                if mean > best:
                    best, pair = mean, (j, i)
        clusters[pair[0]] += clusters.pop(pair[1])
    return clusters


if __name__ == "__main__":
    main()
