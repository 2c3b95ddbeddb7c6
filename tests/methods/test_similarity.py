"""Saliency and similarity of the experts of one layer against loops over its tokens."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import tensor, view_of

from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.view import LayerView


def _layer(logits: torch.Tensor, counts: list[int], gates: list[float], seed: int = 0) -> LayerView:
    double, number = logits.double(), torch.tensor(len(logits))
    sums = {"counts": tensor(counts).long(), "gate_sum": tensor(gates), "logit_gram": double.T @ double}
    return view_of(num_experts=len(counts), seed=seed, tokens=number, **sums)


LOGITS = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
LAYER = _layer(LOGITS, [12, 0, 3, 15, 0, 30], [6.0, 0, 1.5, 9.0, 0, 12.0])


SALIENCIES = [("frequency", [0.4, 0, 0.1, 0.5, 0, 1]), ("gate", [0.2, 0, 0.05, 0.3, 0, 0.4])]


@pytest.mark.parametrize(("method", "expected"), SALIENCIES)
def test_saliency_is_a_share_of_the_tokens(method: str, expected: list[float]) -> None:
    assert SALIENCY[method](LAYER).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["frequency", "gate"])
def test_saliency_without_tokens_is_zero(method: str) -> None:
    assert SALIENCY[method](_layer(torch.zeros(0, 4), [0] * 4, [0.0] * 4)).tolist() == [0] * 4


def test_router_logits_similarity_is_the_cosine_of_two_experts_logits() -> None:
    found = SIMILARITY["router_logits"](LAYER)
    rows = LOGITS.double().T.tolist()
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            dot = sum(a * b for a, b in zip(left, right, strict=True))
            expected = dot / math.sqrt(sum(a * a for a in left)) / math.sqrt(sum(b * b for b in right))
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_router_logits_similarity_does_not_depend_on_the_scale_of_a_row(scale: float) -> None:
    scaled = LOGITS.double() * tensor([1, scale, 1, 1, scale, 1])
    found = SIMILARITY["router_logits"](_layer(scaled, [1] * 6, [1.0] * 6))
    torch.testing.assert_close(found, SIMILARITY["router_logits"](LAYER))


def test_an_expert_without_logits_is_like_none() -> None:
    silent = LOGITS.clone()
    silent[:, 2] = 0
    found = SIMILARITY["router_logits"](_layer(silent, [1] * 6, [1.0] * 6))
    assert found[2].tolist() == found[:, 2].tolist() == [0] * 6
    assert found.isfinite().all()


def test_random_similarity_is_symmetric_and_a_function_of_the_seed() -> None:
    first, again, other = (SIMILARITY["random"](replace(LAYER, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, first.T)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 6 * 7 / 2


@pytest.mark.parametrize("method", ["router_logits", "random"])
def test_every_similarity_is_a_finite_matrix_of_doubles(method: str) -> None:
    found = SIMILARITY[method](LAYER)
    assert found.shape == (6, 6)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
