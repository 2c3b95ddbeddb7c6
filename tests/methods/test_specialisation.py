"""How specialised experts are: known distributions, and what scikit-learn and an SVD say of made ones."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.specialisation import (
    entropy,
    gate_entropy,
    mutual_information,
    specialisation,
    stable_rank,
    stable_ranks,
)
from hf_mcsmoe.methods.view import Sums

E = 4


def _no_experts() -> Experts:
    pytest.fail("the experts were opened")


def _sums(counts: list[int], gate: float, together: dict[tuple[int, int], int]) -> Sums:
    co = torch.diag(torch.tensor(counts))
    for (one, other), number in together.items():
        co[one, other] = co[other, one] = number
    values = {"counts": torch.tensor(counts), "tokens": torch.tensor(40), "gate_entropy": torch.tensor(gate)}
    return Sums(values, co_activation=co)


def test_the_entropy_of_a_gate_is_that_of_its_softmax() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [300.0, 0, 0, 0], [math.log(2.0), 0, -1e9, -1e9]])
    routed = Routed(logits, torch.zeros(3, 2), torch.zeros(3, 1).long(), torch.ones(3, 1), E, _no_experts)
    thirds = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert float(gate_entropy(routed)) == pytest.approx(math.log(4) + 0 + thirds)


def test_entropies_and_the_pair_of_a_layer() -> None:
    found = specialisation(_sums([10, 10, 20, 4], 8.0, {(0, 1): 5, (1, 2): 9, (2, 3): 4}))
    assert found.routing == pytest.approx(8 / 40)
    shares = [10 / 44, 10 / 44, 20 / 44, 4 / 44]
    assert found.use == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert found.largest == pytest.approx(math.log(4))
    assert found.pair == (1, 2, pytest.approx(9 / math.sqrt(10 * 20))), "4 tokens of expert 3 are too few"
    assert (found.information, found.label) == (None, None)
    assert specialisation(_sums([40, 0, 0, 0], 0.0, {})).pair is None
    assert specialisation(_sums([40, 0, 0, 0], 0.0, {})).use == 0
    with pytest.raises(ValueError, match="'gate_entropy' was not collected"):
        specialisation(Sums(counts=torch.ones(2).long(), tokens=torch.tensor(1), co_activation=torch.eye(2)))


def test_what_an_expert_tells_of_a_label_is_their_mutual_information() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, E, (500,), generator=generator)
    labels = (experts + torch.randint(0, 2, (500,), generator=generator)) % 3
    table = torch.stack([torch.bincount(experts[labels == label], minlength=E) for label in range(3)])
    expected = mutual_info_score(labels.tolist(), experts.tolist())
    assert mutual_information(table) == pytest.approx(expected)
    found = specialisation(_sums(table.sum(0).tolist(), 1.0, {}), list(table))
    assert found.information == pytest.approx(expected)
    assert found.label == pytest.approx(entropy(torch.bincount(labels)))
    assert mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(math.log(2)), "each its own expert"
    assert mutual_information(torch.tensor([[5, 5], [5, 5]])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (1, 6), (2, 2)])
def test_the_stable_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(matrix.double()) ** 2
    assert stable_rank(matrix) == pytest.approx(float(values.sum() / values.max()))
    assert stable_rank(torch.zeros(shape)) == 0


def test_the_stable_rank_of_a_layer_is_the_mean_over_its_experts() -> None:
    eye = torch.eye(3)
    up = torch.stack([eye, torch.diag(torch.tensor([1.0, 0, 0]))])
    found = stable_ranks(Experts({"up": up, "down": torch.stack([eye, eye])}, lambda _, hidden: hidden))
    assert found == {"up": pytest.approx(2), "down": pytest.approx(3)}
