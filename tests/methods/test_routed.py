"""What a statistic sees of a forward: tokens, picks and what the experts compute, against the model's own blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, inputs
from helpers import Batch, batches, logits
from layouts import LAYOUTS
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, MoELayer, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.layers.batches import run_routed
from hf_mcsmoe.methods.routed import Routed


def _gated_sum(layer: MoELayer, routed: Routed) -> torch.Tensor:
    """Add up the gated outputs [T, D] of all picks."""
    total = torch.zeros(len(routed.hidden), layer.hidden_size)
    for expert in range(layer.num_experts):
        token, _ = torch.where(routed.reached & (routed.index == expert))
        outputs, weights = routed.outputs_of(expert)
        total.index_add_(0, token, outputs * weights[:, None])
    return total


def _outputs(name: str, model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Run the model and return what each layer's container gives, or the block where that gives the experts' sum."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(layer: MoELayer) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple, output: Any) -> None:
            outputs[layer.name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for layer in moe_layers(model):
        by_block = name == "llama4" or (name == "switch_transformers" and not layer.merged)
        (layer.block if by_block else layer.container).register_forward_hook(keep(layer))
    logits(model, batch)
    return outputs


# What the containers of some families add to the sum over the experts.
MORE: dict[str, Callable[[MoELayer, Routed], Any]] = {
    "llama4": lambda layer, routed: layer.block.shared_expert(routed.hidden),
    "jetmoe": lambda layer, routed: 0 if layer.merged else layer.container.bias,
    "longcat_flash": lambda layer, routed: (
        ((routed.index == routed.num_experts) * routed.weights).sum(1, keepdim=True) * routed.hidden
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_gated_outputs_of_the_picks_add_up_to_what_the_layer_gives(name: str, merged: bool) -> None:
    model = build(name)
    if merged:
        statistics = collect_statistics(model, batches(name, model))
        model = merge_experts(model, plan_merge(model, statistics, MergeConfig(experts=3)))
    expected: dict[str, torch.Tensor] = {}

    def keep(layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Any) -> None:
        assert routed.logits.shape == (24, 8)
        assert routed.hidden.shape == (24, layer.hidden_size)
        assert routed.index.shape == routed.weights.shape == (24, layer.top_k)
        assert 0 <= int(routed.index.min()) <= int(routed.index.max()) <= layer.num_experts
        expected[layer.name] = _gated_sum(layer, routed) + MORE.get(name, lambda *_: 0)(layer, routed)

    batch = inputs(name, model)
    run_routed(moe_layers(model), [batch], keep)
    found = _outputs(name, model, batch)
    assert list(found) == list(expected)
    for layer, output in found.items():
        torch.testing.assert_close(output.reshape(24, -1), expected[layer], rtol=1e-4, atol=1e-5)


def test_two_scaled_picks_of_a_token_are_one_token_and_two_inputs() -> None:
    model = build("llama4")
    for layer in moe_layers(model):
        layer.router.top_k = 2
    seen: list[Routed] = []
    batch = inputs("llama4", model)
    run_routed(moe_layers(model)[:1], [batch], lambda layer, routed, counted, batch: seen.append(routed))
    (routed,) = seen
    rows = routed.per_input()
    assert routed.scale is not None
    assert routed.index.shape == routed.scale.shape == (24, 2)
    assert rows.hidden.shape == (48, routed.hidden.shape[1])
    for token in range(24):
        for pick in range(2):
            expert = int(routed.index[token, pick])
            score = routed.logits[token, expert].sigmoid()
            torch.testing.assert_close(rows.hidden[2 * token + pick], routed.hidden[token] * score)
            assert rows.index[2 * token + pick].item() == expert
    first = next(iter(collect_statistics(model, [batch], ["counts", "gate_sum"]).layers.values()))
    assert first.tokens == 21
    assert first.counts.sum() == 42


def test_experts_are_opened_only_by_what_touches_them() -> None:
    model = build("mixtral")
    layer = moe_layers(model)[0]
    opened: list[str] = []

    class Source:
        """Tells which modules are loaded."""

        def __init__(self) -> None:
            self.model, self.inner = model, layer.source

        def loaded(self, path: str) -> Any:
            opened.append(path)
            return self.inner.loaded(path)

        def streamed(self) -> Any:
            return self.inner.streamed()

    layers = moe_layers(Source())
    collect_statistics(layers, batches("mixtral", model, 1), ["counts", "gate_sum", "logit_gram"])
    assert not any(path.endswith("experts") for path in opened)
    run_routed(layers, batches("mixtral", model, 1), lambda layer, routed, counted, batch: len(routed.experts))
    assert [path for path in opened if path.endswith("experts")] == layers.names
