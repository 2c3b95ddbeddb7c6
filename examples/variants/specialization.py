"""Trains small dense mixtures on clusters of points, and prints accuracy and how far the experts specialise.

python examples/variants/specialization.py
"""

import argparse
import statistics

import torch
from common import table
from torch.nn.functional import nll_loss

from hf_mcsmoe.variants import (
    DenseMixture,
    importance_loss,
    mutual_information,
    sample_entropy,
    sample_similarity_loss,
    utilization_entropy,
)

CLASSES, INPUTS, EXPERTS, NUMBER = 10, 8, 5, 2000
ARMS = {
    "plain gate": {},
    "plain gate, importance": {"importance": True},
    "plain gate, sample similarity": {"similarity": True},
    "attentive gate": {"attentive": True},
    "attentive gate, sample similarity": {"attentive": True, "similarity": True},
}


def clusters(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of ten overlapping clusters and which one each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres, labels = torch.randn(CLASSES, INPUTS, generator=generator) * 1.5, torch.arange(NUMBER) % CLASSES
    return centres[labels] + torch.randn(NUMBER, INPUTS, generator=generator), labels


def measure(
    seed: int, steps: int, *, attentive: bool = False, similarity: bool = False, importance: bool = False
) -> list[float]:
    """Train one mixture; returns accuracy, H_s, H_u and I(E; Y)."""
    samples, labels = clusters(seed)
    torch.manual_seed(seed)
    model = DenseMixture(INPUTS, CLASSES, num_experts=EXPERTS, attentive=attentive)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(steps):
        chosen = torch.randint(NUMBER // 2, (128,))
        found, gates = model(samples[chosen])
        loss = nll_loss(found, labels[chosen])
        if similarity:
            loss = loss + sample_similarity_loss(gates, samples[chosen], same=1.0, different=1.0)
        if importance:
            loss = loss + importance_loss(gates, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found, gates = model(samples[NUMBER // 2 :])
    judged = labels[NUMBER // 2 :]
    accuracy = (found.argmax(-1) == judged).float().mean()
    measures = (accuracy, sample_entropy(gates), utilization_entropy(gates), mutual_information(gates, judged))
    return [float(value) for value in measures]


def main() -> None:
    """Train every arm with every seed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--seeds", type=int, default=10)
    given = options.parse_args()
    lines = []
    for name, arm in ARMS.items():
        figures = zip(*(measure(seed, given.steps, **arm) for seed in range(given.seeds)), strict=True)
        lines.append([name, *(f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in figures)])
    table(["trained", "accuracy", "H_s", "H_u", "I(E; Y)"], lines)


if __name__ == "__main__":
    main()
