"""The modules that stand where the experts stood: picks that meet, tokens over capacity, gradients, router logits."""

from typing import Any

import pytest
import torch
from helpers import poison_grouped_products
from merged import example
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_mcsmoe.modeling.experts_mcsmoe import MergedSwitchSparseMLP, StackedExperts, install_experts
from hf_mcsmoe.modeling.forward_mcsmoe import merge_picks

D, F, T = 32, 24, 7
EXPERT_MAP = [0, 1, 0, 2, 1, 0]
# Picks of 3 of 6 experts: none meet, two meet, all meet; a repeated expert, and one of weight 0.
PICKS = [[0, 1, 3], [0, 2, 3], [0, 2, 5], [5, 4, 1], [3, 4, 0], [2, 2, 1], [1, 0, 4]]


@pytest.fixture
def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, D], the stored experts of picks [T, K] and their weights [T, K]."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(T, 3, generator=generator) + 0.1
    weights[6, 1] = 0
    return torch.randn(T, D, generator=generator), torch.tensor(EXPERT_MAP)[torch.tensor(PICKS)], weights


@pytest.fixture
def experts() -> MixtralExperts:
    """Three stored experts of Mixtral behind a router of six."""
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=len(EXPERT_MAP))
    holder = nn.Module()
    holder.experts = MixtralExperts(config)
    merged = install_experts(holder, "experts", EXPERT_MAP)
    for parameter in merged.parameters():
        nn.init.normal_(parameter, std=0.2)
    return merged


def _naive(experts: MixtralExperts, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens and picks one by one."""
    output = torch.zeros_like(hidden)
    for token in range(index.shape[0]):
        for pick in range(index.shape[1]):
            stored = index[token, pick]
            gate, up = (experts.gate_up_proj[stored] @ hidden[token]).chunk(2)
            output[token] += weights[token, pick] * (experts.down_proj[stored] @ (nn.functional.silu(gate) * up))
    return output


@pytest.mark.parametrize("implementation", ["mcsmoe", "eager", "batched_mm", "grouped_mm"])
def test_output_is_the_sum_over_the_picks(
    implementation: str, experts: MixtralExperts, routing: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_grouped_products(monkeypatch)
    experts.config._experts_implementation = implementation
    torch.testing.assert_close(experts(*routing), _naive(experts, *routing), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["mcsmoe", "eager", "batched_mm", "grouped_mm"])
def test_gradients_are_those_of_the_sum_over_the_picks(
    implementation: str, experts: MixtralExperts, routing: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_grouped_products(monkeypatch)
    experts.config._experts_implementation = implementation
    hidden, index, weights = routing
    inputs = [hidden.requires_grad_(), weights.requires_grad_(), experts.gate_up_proj, experts.down_proj]
    found, expected = (
        torch.autograd.grad(function(hidden, index, weights).square().sum(), inputs)
        for function in (experts, lambda *arguments: _naive(experts, *arguments))
    )
    if implementation == "mcsmoe":  # a pick that is not computed tells its router nothing
        expected[1].masked_fill_(weights == 0, 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def _stored_picks() -> int:
    """Count the pairs of a token and a stored expert that have to be computed."""
    return sum(
        len({EXPERT_MAP[pick] for place, pick in enumerate(picks) if (token, place) != (6, 1)})
        for token, picks in enumerate(PICKS)
    )


def test_picks_that_meet_are_computed_once(experts: MixtralExperts, routing: tuple[torch.Tensor, ...]) -> None:
    experts.config._experts_implementation = "mcsmoe"
    with FlopCounterMode(display=False) as counter:
        experts(*routing)
    assert counter.get_total_flops() == _stored_picks() * 2 * (2 * F * D + D * F)
    assert _stored_picks() < T * 3


def test_the_grouped_product_computes_the_same_rows(
    experts: MixtralExperts, routing: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, product = [], moe._grouped_linear

    def counted(states: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        rows.append(int(offsets[-1]))
        return product(states, weight, offsets, **kwargs)

    monkeypatch.setattr(moe, "_grouped_linear", counted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    experts.config._experts_implementation = "mcsmoe"
    experts(*routing)
    assert rows == [_stored_picks()] * 2


def test_merge_picks_by_hand() -> None:
    index, weights = merge_picks(torch.tensor([[0, 0, 2], [1, 2, 1]]), torch.tensor([[1.0, 2, 4], [8, 0, 16]]), 3)
    assert index.tolist() == [[0, 3, 2], [1, 3, 3]]
    assert weights.tolist() == [[3, 0, 4], [24, 0, 0]]


@pytest.fixture
def switch() -> tuple[SwitchTransformersSparseMLP, MergedSwitchSparseMLP]:
    """A sparse MLP whose experts overflow, and the merged one with the same experts."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=4, expert_capacity=2, dropout_rate=0.0)
    block = SwitchTransformersSparseMLP(config)
    experts = StackedExperts(4, (D, F), nn.ReLU(), has_gate=False)
    for index in range(4):
        expert = block.experts[f"expert_{index}"]
        experts.up_proj.data[index], experts.down_proj.data[index] = expert.wi.weight.data, expert.wo.weight.data
    return block.eval(), MergedSwitchSparseMLP(block.router, experts, list(range(4))).eval()


def test_merged_switch_block_is_the_original_for_all_experts(
    switch: tuple[SwitchTransformersSparseMLP, MergedSwitchSparseMLP],
) -> None:
    original, merged = switch
    hidden = torch.randn(3, 12, D)
    dropped = ~original.router(hidden)[0].any(-1)
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.equal(merged(hidden)[dropped], torch.zeros(int(dropped.sum()), D))
    torch.testing.assert_close(merged(hidden), original(hidden), atol=1e-6, rtol=1e-5)


def test_merged_switch_block_has_the_originals_gradients(
    switch: tuple[SwitchTransformersSparseMLP, MergedSwitchSparseMLP],
) -> None:
    original, merged = switch
    hidden = torch.randn(3, 12, D, requires_grad=True)
    weights = [f"experts.expert_{index}.wi.weight" for index in range(4)]
    expected = torch.autograd.grad(
        original(hidden).square().sum(),
        [hidden, original.router.classifier.weight, *map(original.get_parameter, weights)],
    )
    found = torch.autograd.grad(
        merged(hidden).square().sum(), [hidden, merged.router.classifier.weight, merged.experts.up_proj]
    )
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], torch.stack(expected[2:]), atol=1e-5, rtol=1e-4)
    assert found[1].any()


@pytest.mark.parametrize(
    ("name", "field"), [("mixtral", "router_logits"), ("switch_transformers", "encoder_router_logits")]
)
def test_router_logits_are_recorded_as_before(name: str, field: str) -> None:
    case = example(name)
    before, after = (model(**case.batch, output_router_logits=True)[field] for model in (case.base, case.merged))
    assert [item.shape for item in after] == [item.shape for item in before]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_router_losses_take_part_in_training() -> None:
    case = example("mixtral")
    outputs = [
        case.merged(**case.batch, labels=case.batch["input_ids"], output_router_logits=wanted)
        for wanted in (False, True)
    ]
    added = case.merged.config.router_aux_loss_coef * outputs[1].aux_loss
    assert added > 0
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss + added)
