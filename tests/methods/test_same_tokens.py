"""How alike experts are by what they make of the same tokens, against loops with the experts written out by hand."""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import numpy
import pytest
import torch
from families import build
from helpers import Batch, Expert, batches, expert, shuffled, view_of
from layouts import LAYOUTS
from scipy.optimize import linear_sum_assignment
from token_oracle import answers, collected, output_of
from transformers import PreTrainedModel

from hf_mcsmoe import collect_statistics, moe_layers
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

NAMES = ["mixtral", "qwen3_moe", "nemotron_h"]
# The other layouts are among the slow tests.
EVERY = [pytest.param(name, marks=() if name in NAMES else pytest.mark.slow) for name in LAYOUTS]
NEEDS = [name for name, method in STATISTICS.methods.items() if method.from_data and not method.gradients]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _layers(name: str) -> Iterator[tuple[LayerView, list[Expert], list]]:
    """Yield what a method sees of each layer, its experts, and the tokens that ran."""
    model, sums, tokens = collected(name, NEEDS)
    for layer in moe_layers(model):
        with layer.view(sums[layer.name], 0) as view:
            yield view, [LAYOUTS[name].before(layer.container, index) for index in range(8)], tokens[layer.name]


def _pairwise(of: Callable[[int, int], float]) -> torch.Tensor:
    return torch.tensor([[of(i, j) for j in range(8)] for i in range(8)], dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_for_the_same_tokens(name: str) -> None:
    for view, experts, _ in islice(_layers(name), 1, 2):
        hidden, logits = view.sample.hidden, view.sample.logits.double()
        outputs = [torch.stack([output_of(one, x) for x in hidden]).double() for one in experts]
        means = [given.mean(0) for given in outputs]
        expected = _pairwise(lambda i, j, means=means: -(float((means[i] - means[j]).square().sum()) ** 0.5))
        torch.testing.assert_close(SIMILARITY["expert_output"](view), expected, **CLOSE)

        centred = [given - given.mean(0) for given in outputs]

        def cka(i: int, j: int, centred: list[torch.Tensor] = centred) -> float:
            cross, own, other = centred[j].T @ centred[i], centred[i].T @ centred[i], centred[j].T @ centred[j]
            return float(cross.square().sum() / (own.square().sum() * other.square().sum()).sqrt())

        torch.testing.assert_close(SIMILARITY["cka"](view), _pairwise(cka), **CLOSE)

        gates = logits.exp() / logits.exp().sum(1, keepdim=True)
        gated = [sum(g * y for g, y in zip(gates[:, i], given, strict=True)) for i, given in enumerate(outputs)]
        norms = view.sums["logit_gram"].diagonal().sqrt()
        cosines = (view.sums["logit_gram"] / torch.outer(norms, norms)).clamp(max=1)
        apart = (2 - 2 * cosines).sqrt().fill_diagonal_(0)

        def mixture(i: int, j: int, gated: list = gated, apart: torch.Tensor = apart) -> float:
            cosine = torch.nn.functional.cosine_similarity(gated[i], gated[j], dim=0)
            return float((1 + cosine) / 2 + 1 - apart[i, j] / apart.max()) / 2

        torch.testing.assert_close(SIMILARITY["gated_mixture"](view), _pairwise(mixture), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_a_mean_of_weights(name: str) -> None:
    for view, experts, _ in islice(_layers(name), 1):
        sample = view.sample
        reached = [[x for x, picks in zip(sample.hidden, sample.index, strict=True) if e in picks] for e in range(8)]
        energy = sum(float(output_of(experts[e], x).square().sum()) for e in range(8) for x in reached[e])

        def mse(i: int, j: int, experts: list = experts, reached: list = reached, energy: float = energy) -> float:
            merged = {role: (experts[i][role] + experts[j][role]) / 2 for role in experts[i]}
            missed = [output_of(merged, x) - output_of(experts[e], x) for e in (i, j) for x in reached[e]]
            return 1 / (1 + sum(float(y.square().sum()) for y in missed) / energy)

        torch.testing.assert_close(SIMILARITY["mse"](view), _pairwise(mse), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_that_no_mix_avoids(name: str) -> None:
    for view, experts, tokens in _layers(name):
        found = SIMILARITY["merge_error"](view)
        outputs = [torch.stack([output_of(one, x) for x in view.sample.hidden]).double() for one in experts]
        for i, j in ((0, 1), (2, 5), (6, 3), (4, 7)):
            both = [(w[p.index(i)], w[p.index(j)]) for _, p, w in tokens if i in p and j in p]
            expected = 0.0
            if both:
                shares = [a / (a + b) for a, b in both]
                mean = sum(shares) / len(shares)
                variance = sum((share - mean) ** 2 for share in shares) / len(shares)
                distance = float((outputs[i] - outputs[j]).square().sum(1).mean())
                expected = sum((a + b) ** 2 for a, b in both) / len(tokens) * variance * distance
            assert found[i, j].item() == pytest.approx(-expected, rel=1e-3, abs=1e-9)
        assert found.min() < 0
        assert (found.diagonal() == 0).all()


def _units(one: Expert, x: torch.Tensor) -> torch.Tensor:
    if "gate" in one:
        return torch.nn.functional.silu(one["gate"] @ x) * (one["up"] @ x)
    return torch.relu(one["up"] @ x).square()  # Nemotron-H


@pytest.mark.parametrize("name", NAMES)
def test_correlations_of_hidden_units(name: str) -> None:
    view, experts, _ = next(_layers(name))
    sample = view.sample
    assigned, best = (SIMILARITY[method](view) for method in ("feature_correlation", "feature_correlation_max"))
    for i, j in ((0, 1), (2, 5), (6, 3)):
        tokens = [x for x, picks in zip(sample.hidden, sample.index.tolist(), strict=True) if i in picks or j in picks]
        if len(tokens) < 2:
            assert assigned[i, j] == best[i, j] == 1
            continue
        units = [numpy.stack([_units(experts[e], x).double().numpy() for x in tokens]) for e in (i, j)]
        with numpy.errstate(invalid="ignore", divide="ignore"):
            table = numpy.nan_to_num(numpy.corrcoef(*units, rowvar=False)[:24, 24:])
        matched = table[linear_sum_assignment(table, maximize=True)].mean()
        assert assigned[i, j].item() == pytest.approx((1 + matched) / 2, abs=1e-4)
        largest = (table.max(0).mean() + table.max(1).mean()) / 2
        assert best[i, j].item() == pytest.approx((1 + largest) / 2, abs=1e-4)


def test_an_expert_with_shuffled_neurons_has_all_of_its_units_again() -> None:
    one, other = expert(("gate", "up", "down"), 6), expert(("gate", "up", "down"), 6, seed=1)
    hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    table = torch.zeros(40, 2 + 8 + 3 + 3)  # K and D, inputs, logits, one pick, its weight, its scale
    table[:, 0], table[:, 1], table[:, 2:10], table[:, 14:] = 1, 8, hidden, 1
    table[:, 13] = torch.arange(40) % 3
    view = view_of([one, other, shuffled(one, 3)], sample=table)
    found = SIMILARITY["feature_correlation"](view)
    assert found[0, 2].item() == pytest.approx(1, abs=1e-5)
    assert found[0, 1] < 0.9
    assert SIMILARITY["cka"](view)[0, 2].item() == pytest.approx(1, abs=1e-5)
    assert SIMILARITY["weight"](view)[0, 2] < 0.9, "neurons are compared where they lie"


def test_cka_sees_neither_a_rotation_nor_a_scale() -> None:
    generator = torch.Generator().manual_seed(5)
    one, other = expert(("up", "down"), 6), expert(("up", "down"), 6, seed=1)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    turned = {"up": one["up"], "down": 3 * rotation @ one["down"]}
    hidden = torch.randn(40, 8, generator=generator)
    table = torch.zeros(40, 2 + 8 + 3 + 3)
    table[:, 0], table[:, 1], table[:, 2:10], table[:, 14:] = 1, 8, hidden, 1
    found = SIMILARITY["cka"](view_of([one, other, turned], sample=table))
    assert found[0, 2].item() == pytest.approx(1, abs=1e-6)
    assert found[0, 1] < 0.9


def _two_tokens(name: str, model: PreTrainedModel) -> list[Batch]:
    """Return a batch in which two tokens count, so that most experts are reached by none."""
    batch = batches(name, model, number=1, batch_size=1)[0]
    for mask in (key for key in batch if key.endswith("attention_mask")):
        batch[mask] = batch[mask].clone().zero_()
        batch[mask][:, :2] = 1
    return [batch]


@pytest.mark.parametrize("name", EVERY)
def test_every_criterion_bears_experts_that_no_token_reached(name: str) -> None:
    model = build(name)
    sums = collect_statistics(model, _two_tokens(name, model), NEEDS).layers
    layer = moe_layers(model)[0]
    assert (sums[layer.name].counts == 0).any()
    for stage in ("similarity", "saliency"):
        for method, entry in REGISTRIES[stage].methods.items():
            if not set(entry.needs) <= set(NEEDS):
                continue
            with layer.view(sums[layer.name], 0) as view:
                if method.startswith("router_weight") and name in ("longcat_flash", "muse_spark", "zaya"):
                    continue  # which say so; see the test of router rows
                found = entry.function(view)
            assert found.isfinite().all(), method
            assert found.dtype == torch.float64, method
            assert found.device.type == "cpu", method


@pytest.mark.parametrize("name", NAMES)
def test_norms_of_outputs_without_gates(name: str) -> None:
    model, sums, tokens = collected(name, ["output_norms", "counts"])
    total, mean = (answers(model, "saliency", method, sums) for method in ("ean", "man"))
    for layer in moe_layers(model):
        for index in range(8):
            one = LAYOUTS[name].before(layer.container, index)
            norms = [float(output_of(one, x).norm()) for x, picks, _ in tokens[layer.name] if index in picks]
            assert total[layer.name][index].item() == pytest.approx(math.fsum(norms), rel=1e-4)
            assert mean[layer.name][index].item() == pytest.approx(math.fsum(norms) / max(1, len(norms)), rel=1e-4)


def test_the_random_control_follows_the_seed() -> None:
    first, again, other = (REGISTRIES["saliency"]["random"](view_of(num_experts=9, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 9
