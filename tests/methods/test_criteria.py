"""Statistics and criteria of one file each, against loops over tokens with the experts written out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from layouts import LAYOUTS
from token_oracle import answers, collected, output_of
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, collect_statistics, compress, moe_layers, plan_merge
from hf_mcsmoe.calibration.reference import add_reference
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.statistics import STATISTICS, of_data
from hf_mcsmoe.methods.view import Sums

NAMES = ["mixtral", "qwen3_moe", "nemotron_h"]


@pytest.mark.parametrize("name", NAMES)
def test_co_activation_counts_tokens_that_pick_both(name: str) -> None:
    model, sums, tokens = collected(name, ["co_activation"])
    similar = answers(model, "similarity", "co_activation", sums)
    for layer, seen in tokens.items():
        expected = [[sum(i in picks and j in picks for _, picks, _ in seen) for j in range(8)] for i in range(8)]
        assert sums[layer]["co_activation"].tolist() == expected
        assert sums[layer]["co_activation"].dtype == torch.int64
        for i in range(8):
            for j in range(8):
                scale = math.sqrt(expected[i][i] * expected[j][j])
                assert similar[layer][i, j].item() == pytest.approx(expected[i][j] / scale if scale else 0)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_experts_equal_a_loop_over_their_tokens(name: str) -> None:
    model, sums, tokens = collected(name, ["output_sum", "contribution", "counts"])
    saliency = {method: answers(model, "saliency", method, sums) for method in ("contribution", "reap")}
    similar = answers(model, "similarity", "mean_output", sums)
    for layer in moe_layers(model):
        means = []
        for index in range(8):
            expert = LAYOUTS[name].before(layer.container, index)
            total, gated, number = torch.zeros(layer.hidden_size, dtype=torch.float64), 0.0, 0
            for x, picks, weights in tokens[layer.name]:
                if index in picks:
                    output = output_of(expert, x).double()
                    total, number = total + output, number + 1
                    gated += weights[picks.index(index)] * float(output.norm())
            torch.testing.assert_close(sums[layer.name]["output_sum"][index], total, rtol=1e-4, atol=1e-4)
            assert saliency["contribution"][layer.name][index].item() == pytest.approx(gated, rel=1e-4)
            assert saliency["reap"][layer.name][index].item() == pytest.approx(gated / max(number, 1), rel=1e-4)
            means.append(total / max(number, 1))
        for i in range(8):
            for j in range(8):
                scale = float(means[i].norm() * means[j].norm())
                expected = float(means[i] @ means[j]) / scale if scale else 0
                assert similar[layer.name][i, j].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_fluctuation_is_the_deviation_of_outputs_times_the_gates_per_token(name: str) -> None:
    needs = ["output_sum", "output_squares", "counts", "gate_sum", "tokens"]
    model, sums, tokens = collected(name, needs)
    found = answers(model, "saliency", "fluctuation", sums)
    for layer in moe_layers(model):
        seen = tokens[layer.name]
        for index in range(8):
            expert = LAYOUTS[name].before(layer.container, index)
            outputs = [output_of(expert, x).double() for x, picks, _ in seen if index in picks]
            gates = sum(weights[picks.index(index)] for _, picks, weights in seen if index in picks) / len(seen)
            spread = torch.stack(outputs).std(0).norm().item() if len(outputs) > 1 else 0.0
            assert found[layer.name][index].item() == pytest.approx(spread * gates, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_taylor_is_weights_times_gradients_of_the_loss(name: str, labels: bool) -> None:
    model = build(name).requires_grad_(False)
    data = batches(name, model)
    if labels or name == "switch_transformers":
        data = [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in data
        ]
    statistics = collect_statistics(model, data, ["taylor", "counts"])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    plain = collect_statistics(model, data, ["counts"])
    saliency = answers(model, "saliency", "taylor", statistics.layers)
    twin = build(name)
    expected = {layer.name: [0.0] * 8 for layer in moe_layers(twin)}
    for batch in data:
        twin.zero_grad()
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        twin(**{**batch, "labels": batch.get("labels", targets)}).loss.backward()
        for layer in moe_layers(twin):
            for index in range(8):
                for _, parameter in _of_expert(layer, index):
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    rows = (parameter * gradient).detach().double()
                    rows = rows[index] if len(rows) == 8 and name != "switch_transformers" else rows
                    expected[layer.name][index] += float(rows.abs().sum())
    for layer, found in saliency.items():
        assert torch.equal(statistics[layer].counts, plain[layer].counts)
        assert found.tolist() == pytest.approx(expected[layer], rel=1e-3)
        assert found.max() > 0


def _of_expert(layer: Any, index: int) -> list[tuple[str, torch.nn.Parameter]]:
    named = layer.parameters
    return [item for item in named if not item[0].startswith("expert_") or item[0].startswith(f"expert_{index}.")]


def test_gradients_that_cannot_be_had_are_refused() -> None:
    model = build("switch_transformers")
    with pytest.raises(ValueError, match="gave no loss for a batch of"):
        collect_statistics(model, batches("switch_transformers", model), ["taylor"])


STAGES = ["saliency", "similarity"]
METHODS = [(stage, method) for stage in STAGES for method in REGISTRIES[stage]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the checkpoint that the model was trained from."""
    folder = tmp_path_factory.mktemp("reference")
    build("mixtral", seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def everything(reference: Path) -> tuple[PreTrainedModel, Any]:
    """Return a model and all of its statistics."""
    model = build("mixtral")
    statistics = collect_statistics(model, batches("mixtral", model), of_data(STATISTICS))
    return model, add_reference(statistics, Layers.of(model), reference)


@pytest.mark.parametrize(("stage", "method"), METHODS)
def test_every_criterion_is_finite_deterministic_and_of_its_shape(stage: str, method: str, everything: Any) -> None:
    model, statistics = everything
    needs = MergeConfig(**{stage: method}).needs
    for layer in moe_layers(model):
        only = Sums({name: statistics[layer.name][name] for name in needs})
        found = []
        for _ in range(2):
            with layer.view(only, 7) as view:
                found.append(REGISTRIES[stage][method](view))
        assert torch.equal(*found)
        assert found[0].shape == ((8,) if stage == "saliency" else (8, 8))
        assert found[0].dtype == torch.float64
        assert found[0].isfinite().all()
        if stage == "saliency":
            assert (found[0] >= 0).all() or method == "router_norm_change"
        else:
            torch.testing.assert_close(found[0], found[0].T)


ALL = [(stage, method) for stage, registry in REGISTRIES.items() for method in registry]


@pytest.mark.parametrize(("stage", "method"), ALL)
def test_every_method_makes_a_plan_and_a_model(stage: str, method: str, everything: Any, reference: Path) -> None:
    model, statistics = everything
    config = MergeConfig(**{"experts": 3, stage: method})
    if method == "measured":  # on the model, by `compress` alone; tested with the search
        with pytest.raises(ValueError, match="which `compress` does"):
            plan_merge(model, statistics, config)
        return
    plan = plan_merge(model, statistics, config)
    data, base = batches("mixtral", model), reference if method == "router_norm_change" else None
    again = collect_statistics(model, data, of_data(config.needs))
    again = add_reference(again, Layers.of(model), base) if base else again
    assert plan == plan_merge(model, again, config)
    merged = compress(model, data, config, base_model=base)
    assert [layer.num_experts for layer in moe_layers(merged)] == [len(x.dominant) for x in plan.layers.values()]
