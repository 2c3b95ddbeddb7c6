"""Measures of specialisation on gates that are known, the loss by hand, the gates of the reference mixture."""

import math

import pytest
import torch

from hf_mcsmoe.variants import (
    DenseMixture,
    importance_loss,
    mutual_information,
    sample_entropy,
    sample_similarity_loss,
    utilization_entropy,
)

LABELS = torch.tensor([0, 0, 1, 1])
ONE_HOT, UNIFORM = torch.eye(2)[LABELS], torch.full((4, 2), 0.5)


@pytest.mark.parametrize(
    ("gate", "labels", "expected"),
    [
        (ONE_HOT, LABELS, (0, 1, 1)),
        (UNIFORM, LABELS, (1, 1, 0)),
        (ONE_HOT[:1].expand(4, 2), LABELS, (0, 0, 0)),
        (ONE_HOT, torch.tensor([0, 1, 0, 1]), (0, 1, 0)),
    ],
)
def test_measures_of_known_gates_in_bits(gate: torch.Tensor, labels: torch.Tensor, expected: tuple) -> None:
    found = (sample_entropy(gate), utilization_entropy(gate), mutual_information(gate, labels))
    assert [float(value) / math.log(2) for value in found] == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_three_points_is_the_double_sum() -> None:
    points, gate = (
        torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 10.0]]),
        torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]),
    )
    distances = [[math.dist(a, b) / 10 for b in points.tolist()] for a in points.tolist()]
    rows = gate.tolist()
    sums = {
        (e, f): sum(rows[i][e] * rows[j][f] * distances[i][j] for i in range(3) for j in range(3))
        for e in range(2)
        for f in range(2)
    }
    expected = 0.3 * (sums[0, 0] + sums[1, 1]) / (2 * 9) - 0.7 * (sums[0, 1] + sums[1, 0]) / (2 * 9)
    found = sample_similarity_loss(gate, points, same=0.3, different=0.7)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_loss_prefers_experts_with_clusters_of_their_own_and_takes_a_part_of_many_samples() -> None:
    torch.manual_seed(0)
    labels = torch.arange(2).repeat_interleave(300)
    samples = torch.randn(600, 3) + 20 * labels[:, None]
    own, shuffled = torch.eye(2)[labels], torch.eye(2)[labels[torch.randperm(600)]]
    assert sample_similarity_loss(own, samples) < sample_similarity_loss(shuffled, samples)
    whole = sample_similarity_loss(own, samples, most=600)
    assert float(sample_similarity_loss(own, samples, most=100)) == pytest.approx(float(whole), rel=0.1)


def test_importance_is_the_squared_coefficient_of_variation() -> None:
    assert float(importance_loss(UNIFORM)) == 0
    gate = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # use 1.5 and 0.5
    assert float(importance_loss(gate, 2.0)) == pytest.approx(2 * (0.5 / 1.0) ** 2)


@pytest.mark.parametrize("attentive", [False, True])
def test_a_mixture_is_the_weighted_sum_of_its_experts_logits(attentive: bool) -> None:
    torch.manual_seed(0)
    model, samples = DenseMixture(4, 3, num_experts=2, attentive=attentive), torch.randn(5, 4)
    found, gates = model(samples)
    hidden = [layer(samples).relu() for layer in model.hidden]
    query = model.gate(model.gate_hidden(samples).relu())
    if attentive:
        query = torch.stack([(query * model.keys(h)).sum(-1) / math.sqrt(32) for h in hidden], dim=1)
    torch.testing.assert_close(gates, query.softmax(-1))
    logits = sum(gates[:, [e]] * model.heads[e](hidden[e]) for e in range(2))
    torch.testing.assert_close(found, logits.log_softmax(-1))


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "labels": (lambda: mutual_information(ONE_HOT, LABELS[:3]), "each of 4 samples"),
        "rows": (lambda: sample_similarity_loss(ONE_HOT, torch.zeros(3, 2)), "for each sample"),
        "one expert": (lambda: sample_similarity_loss(torch.ones(3, 1), torch.zeros(3, 2)), "two or more experts"),
        "same": (lambda: sample_similarity_loss(ONE_HOT, torch.zeros(4, 2), same=math.nan), "same must be 0 or more"),
        "different": (lambda: sample_similarity_loss(ONE_HOT, torch.zeros(4, 2), different=-1.0), "must be 0 or more"),
        "most": (lambda: sample_similarity_loss(ONE_HOT, torch.zeros(4, 2), most=0), "most must be a whole number"),
        "importance": (lambda: importance_loss(ONE_HOT, math.inf), "weight must be 0 or more and finite, not inf"),
        "mixture": (lambda: DenseMixture(4, 3, num_experts=1), "num_experts=1"),
    }.values(),
)  # fmt: skip
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
