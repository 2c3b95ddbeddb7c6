"""How alike experts are by weights, features, gradients and router rows, against loops over the experts and tokens."""

import pytest
import torch
from families import build
from helpers import batches
from layouts import LAYOUTS
from token_oracle import answers, collected
from transformers import PreTrainedModel

from hf_mcsmoe import collect_statistics, moe_layers
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.view import Sums

NAMES = ["mixtral", "qwen3_moe", "nemotron_h"]
# The other layouts are among the slow tests.
EVERY = [pytest.param(name, marks=() if name in NAMES else pytest.mark.slow) for name in LAYOUTS]


def _cosines(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Compute cosines one by one; 0 where one is zero."""
    flat = [vector.detach().double().flatten() for vector in vectors]
    pairs = [[float(a @ b) / (float(a.norm() * b.norm()) or 1) for b in flat] for a in flat]
    return torch.tensor(pairs, dtype=torch.float64)


def _weights(expert: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([expert[role].double().flatten() for role in sorted(expert)])


@pytest.mark.parametrize("name", EVERY)
def test_weights_and_router_rows_are_those_of_the_model(name: str) -> None:
    model = build(name)
    layer = moe_layers(model)[0]
    experts = [LAYOUTS[name].before(layer.container, index) for index in range(8)]
    squares = torch.rand(8, layer.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares[3] = 0  # that no token reached
    total = squares.sum(0)
    with layer.view(Sums(feature_squares=squares, input_squares=total), 0) as view:
        torch.testing.assert_close(SIMILARITY["weight"](view), _cosines([_weights(expert) for expert in experts]))
        scaled = [
            torch.cat([expert[role] * column.sqrt() for role in ("gate", "up") if role in expert])
            for expert, column in zip(experts, squares, strict=True)
        ]
        torch.testing.assert_close(SIMILARITY["weight_feature"](view), _cosines(scaled))
        if view.router is None:
            with pytest.raises(ValueError, match="has no matrix with a row for each of its 8 experts"):
                SIMILARITY["router_weight"](view)
            return
        torch.testing.assert_close(SIMILARITY["router_weight"](view), _cosines([*view.router]))
        if view.router.shape[1] != layer.hidden_size:
            with pytest.raises(ValueError, match="reads 32 inputs and the experts other 40"):
                SIMILARITY["router_weight_feature"](view)
            return
        found = SIMILARITY["router_weight_feature"](view)
        torch.testing.assert_close(found, _cosines([row * total.sqrt() for row in view.router]))


def test_every_layout_but_these_has_a_router_of_rows() -> None:
    without = []
    for name in LAYOUTS:
        layer = moe_layers(build(name))[0]
        with layer.view(Sums(), 0) as view:
            if view.router is None:
                without.append(name)
    assert without == ["longcat_flash", "zaya"]  # rows for identities as well; a network


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_inputs_that_reach_an_expert(name: str) -> None:
    needs = ["feature_sum", "feature_abs_sum", "feature_squares", "input_squares"]
    model, sums, tokens = collected(name, needs)
    feature, absolute = (answers(model, "similarity", method, sums) for method in ("feature", "feature_abs"))
    for layer in moe_layers(model):
        seen = [(x.double(), picks) for x, picks, _ in tokens[layer.name]]
        reached = [[x for x, picks in seen if index in picks] or [torch.zeros_like(seen[0][0])] for index in range(8)]
        found = sums[layer.name]
        of = {"feature_sum": lambda x: x, "feature_abs_sum": torch.abs, "feature_squares": torch.square}
        for key, function in of.items():
            expected = torch.stack([sum(map(function, inputs)) for inputs in reached])
            torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["input_squares"], sum(x.square() for x, _ in seen), rtol=1e-6, atol=1e-6)
        means = [sum(inputs) / len(inputs) for inputs in reached]
        torch.testing.assert_close(feature[layer.name], _cosines(means), rtol=1e-5, atol=1e-5)
        means = [sum(map(torch.abs, inputs)) / len(inputs) for inputs in reached]
        torch.testing.assert_close(absolute[layer.name], _cosines(means), rtol=1e-5, atol=1e-5)


def test_scaled_inputs_count_as_they_reach_the_experts() -> None:
    model = build("llama4")
    data = batches("llama4", model)
    statistics = collect_statistics(model, data, ["feature_sum"])
    for layer in moe_layers(model):
        seen: list[torch.Tensor] = []
        hook = layer.container.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        expected = torch.zeros(8, layer.hidden_size, dtype=torch.float64)
        for batch in data:
            with torch.no_grad():
                model(**batch)
            counted = batch["attention_mask"].flatten().bool()
            expected += seen.pop().view(8, -1, layer.hidden_size)[:, counted].double().sum(1)  # others are zeros
        hook.remove()
        torch.testing.assert_close(statistics[layer.name]["feature_sum"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_gradients_are_those_of_each_batch_side_by_side(name: str) -> None:
    model = build(name)
    data = batches(name, model)
    sums = collect_statistics(model, data, ["gradient_gram", "weight_gradient_gram", "gradient_abs"]).layers
    gradients: dict[str, list[list[torch.Tensor]]] = {
        layer.name: [[] for _ in range(8)] for layer in moe_layers(model)
    }
    products = {layer.name: [[] for _ in range(8)] for layer in moe_layers(model)}
    for batch in data:
        model.zero_grad()
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=targets).loss.backward()
        for layer in moe_layers(model):
            for index in range(8):
                parts = [(parameter[index], parameter.grad[index]) for _, parameter in layer.parameters]
                gradients[layer.name][index] += [gradient.flatten() for _, gradient in parts]
                products[layer.name][index] += [(weights * gradient).flatten() for weights, gradient in parts]
    found = {method: answers(model, "similarity", method, sums) for method in ("gradient", "weight_gradient")}
    sizes = answers(model, "saliency", "gradient", sums)
    for layer in moe_layers(model):
        flat = [torch.cat(parts) for parts in gradients[layer.name]]
        close = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(found["gradient"][layer.name], _cosines(flat), **close)
        other = _cosines([torch.cat(parts) for parts in products[layer.name]])
        torch.testing.assert_close(found["weight_gradient"][layer.name], other, **close)
        assert sizes[layer.name].tolist() == pytest.approx([float(vector.abs().sum()) for vector in flat], rel=1e-3)


def _pairs() -> PreTrainedModel:
    """Return a top-2 model of four pairs of equal experts with equal rows of the router: a token picks a pair."""
    model = build("mixtral")
    with torch.no_grad():
        for layer in moe_layers(model):
            for tensor in (*(parameter for _, parameter in layer.parameters), layer.router.weight):
                tensor[1::2] = tensor[::2]
    return model


# All but chance, and the error that two experts have only where both are picked: here no others are.
ALIKE = [name for name in SIMILARITY if name not in ("random", "merge_error")]


def test_an_expert_and_its_copy_are_each_others_nearest() -> None:
    model = _pairs()
    needs = {need for method in ALIKE for need in SIMILARITY.needs(method)} | {"counts"}
    sums = collect_statistics(model, batches("mixtral", model), needs).layers
    for method in ALIKE:
        for name, found in answers(model, "similarity", method, sums).items():
            others = found.fill_diagonal_(-torch.inf)
            reached = sums[name].counts > 0
            assert (others.argmax(1) == torch.arange(8) ^ 1)[reached].all(), (method, name)
            assert reached.sum() >= 4


@pytest.mark.parametrize("registry", [SIMILARITY])
def test_every_entry_says_what_it_returns(registry: Registry) -> None:
    for entry in registry.methods.values():
        assert entry.function.__doc__.startswith("Return "), entry.name
