"""Costs: counted by hand on tiny models, equal to the paper's arithmetic, and told in the card."""

import copy
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from families import build, inputs
from helpers import Batch, batches, state
from layouts import LAYOUTS
from merged import example
from quantized import GROUP, by_expert, decomposed, quantize_model, quantized_example
from torch import nn
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from hf_mcsmoe import MergeConfig, compress, moe_layers
from hf_mcsmoe.evaluation.costs import account, bytes_on_disk, expected_parameters
from hf_mcsmoe.modeling.convert import convert_model
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable, install_layer
from hf_mcsmoe.record import Costs
from hf_mcsmoe.tables import cost_rows

D, F, E, T = 32, 24, 8, 24
IMPLEMENTATIONS = ["mcsmoe", "eager", "batched_mm", "grouped_mm"]


@pytest.fixture(scope="module")
def switch_base_32() -> PreTrainedModel:
    """The shape of google/switch-base-32, without memory."""
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "vocab_size": 32128, "num_experts": 32}
    layers = {"num_layers": 12, "num_decoder_layers": 12}
    sparse = {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
    config = SwitchTransformersConfig(**sizes, **layers, **sparse, decoder_start_token_id=0)
    with torch.device("meta"):
        return SwitchTransformersForConditionalGeneration(config)


def test_the_papers_sizes_of_switch_base_32(switch_base_32: PreTrainedModel) -> None:
    names = [layer.name for layer in moe_layers(switch_base_32)]
    assert len(names) == 12
    stored = dict.fromkeys(names[1:], 8)
    assert round(account(switch_base_32).parameters / 1e6, 1) == 1978.5
    assert expected_parameters(switch_base_32, {}) == account(switch_base_32).parameters
    assert round(expected_parameters(switch_base_32, stored) / 1e6, 1) == 732.8
    assert round(expected_parameters(switch_base_32, stored, rank=32, keep=0.1) / 1e6, 1) == 380.7


def test_the_tensors_held_at_the_size_of_switch_base_32_are_the_papers(switch_base_32: PreTrainedModel) -> None:
    """All sparse layers but the first merged into 8 experts, then of rank 32 with a tenth of S, on the meta device."""
    model = copy.deepcopy(switch_base_32)
    expert_map = [index % 8 for index in range(32)]
    names = [layer.name for layer in moe_layers(model)][1:]
    convert_model(model)
    held = [install_layer(model, name, expert_map) for name in names]
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(732.8e6, rel=1e-2)
    for experts in held:
        for weight, units in (("up_proj", 3072), ("down_proj", 3072)):
            experts.install_low_rank(weight, 32, [round(0.1 * units)] * 8)
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(380.7e6, rel=1e-2)


def test_a_layer_that_is_not_there_has_no_size(switch_base_32: PreTrainedModel) -> None:
    with pytest.raises(
        ValueError, match=r"no layer 'encoder'; its layers: encoder\.block\.1\.layer\.1\.mlp\.experts, "
    ):
        expected_parameters(switch_base_32, {"encoder": 8})


@pytest.mark.parametrize("name", LAYOUTS)
def test_expected_parameters_are_those_of_the_merged_model(name: str) -> None:
    case = example(name)
    stored = {layer: len(item.dominant) for layer, item in case.plan.layers.items()}
    assert expected_parameters(case.base, stored) == case.merged.num_parameters()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers"])
def test_expected_parameters_of_decomposed_experts(name: str) -> None:
    model = build(name)
    first = moe_layers(model)[0].name
    merged, low_rank = (expected_parameters(model, {first: 3}, rank=rank, keep=0.25) for rank in (None, 2))
    up = (F if name == "switch_transformers" else 2 * F, D)
    dense, small = up[0] * D + D * F, 2 * (up[0] + D + D + F) + (up[0] // 4) * D + (D // 4) * F
    assert merged - low_rank == 3 * (dense - small)


def _rest(model: PreTrainedModel) -> int:
    """Return the multiply-adds of a position of a tiny Mixtral outside its experts, over two rows of 12."""
    dense = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    heads, width = model.config.num_attention_heads, D // model.config.num_attention_heads
    return dense + 4 * E * D + 4 * 2 * heads * 12 * width


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operations_of_a_mixtral_are_those_counted_by_hand(implementation: str) -> None:
    model, batch = build("mixtral"), inputs("mixtral", build("mixtral"))
    model.set_experts_implementation(implementation)
    before = state(model)
    found = account(model, batch)
    assert state(model) == before
    assert list(found.expert_macs_per_token.values()) == [2 * 3 * D * F] * 4
    assert list(found.expert_macs_per_token) == [layer.name for layer in moe_layers(model)]
    assert found.flops_per_token == 2 * (_rest(model) + 4 * 2 * 3 * D * F)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_picks_that_meet_in_a_merged_expert_are_executed_once_by_our_implementation(implementation: str) -> None:
    model = build("mixtral")
    data = batches("mixtral", model)
    merged = compress(model, data, MergeConfig(experts=2, budget="uniform"))
    merged.set_experts_implementation(implementation)
    batch = inputs("mixtral", model)
    executed = {}
    for name, tokens in oracle.observe(merged, oracle.FAMILIES["mixtral"], [batch]).items():
        expert_map = merged.config.mcsmoe["layers"][name]["expert_map"]
        executed[name] = sum(len({expert_map[pick] for pick, _ in token.picks}) for token in tokens)
    assert sum(executed.values()) < 2 * 4 * T, "or no picks meet"
    found = account(merged, batch)
    if implementation != "mcsmoe":  # the others compute every pick
        executed = dict.fromkeys(executed, 2 * T)
    expected = {name: number * 3 * D * F / T for name, number in executed.items()}
    assert found.expert_macs_per_token == pytest.approx(expected)
    assert found.flops_per_token == pytest.approx(2 * (_rest(model) + sum(expected.values())))


@pytest.mark.parametrize(
    ("name", "matrices", "picks"),
    [("jetmoe", 3, 2), ("dbrx", 3, 1), ("gpt_oss", 3, 4), ("llama4", 3, E), ("nemotron_h", 2, 2)],
)
def test_operations_of_experts_of_other_layouts(name: str, matrices: int, picks: int) -> None:
    model = build(name)
    layers = {layer.name: layer for layer in moe_layers(model)}
    found = account(model, inputs(name, model)).expert_macs_per_token
    for layer, macs in found.items():
        expert = layers[layer]
        assert macs == picks * matrices * expert.hidden_size * expert.intermediate_size


@torch.no_grad()
def test_operations_of_a_switch_are_those_of_the_tokens_that_are_not_dropped() -> None:
    model, batch = build("switch_transformers"), inputs("switch_transformers", build("switch_transformers"))
    seen = oracle.observe(model, oracle.FAMILIES["switch_transformers"], [batch])
    reached = {name: sum(not token.dropped for token in tokens) for name, tokens in seen.items()}
    assert 0 < min(reached.values()) < max(reached.values()) < T
    # Source and target are 24 positions each.
    expected = {name: number * 2 * D * F / (2 * T) for name, number in reached.items()}
    assert account(model, batch).expert_macs_per_token == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.25, 0.0, None])
@pytest.mark.parametrize("name", ["switch_transformers", "mixtral"])
def test_decomposed_experts_hold_and_execute_their_factors(name: str, share: float | None) -> None:
    """A share of None is the training form, which holds and multiplies all of S."""
    model = build(name)
    merged = compress(model, batches(name, model), MergeConfig(experts=2, budget="uniform"))
    layers, batch, before = moe_layers(merged), inputs(name, model), account(merged, inputs(name, model))
    up = ("up_proj", (F, D)) if name == "switch_transformers" else ("gate_up_proj", (2 * F, D))
    dense = small = 0
    for layer in layers:
        dense = small = 0
        for weight, (rows, columns) in (up, ("down_proj", (D, F))):
            units, width = (columns, rows) if weight == "down_proj" else (rows, columns)
            kept = units if share is None else int(share * units)
            decomposable(layer.container).install_low_rank(weight, 2, None if share is None else [kept] * 2)
            dense, small = dense + rows * columns, small + 2 * (rows + columns) + kept * width
        layer.container.init_low_rank(0.1)
    found, first = account(merged, batch), layers[0].name  # what the layers behind the first one see is another
    assert found.expert_macs_per_token.keys() == before.expert_macs_per_token.keys()
    assert found.expert_macs_per_token[first] == pytest.approx(before.expert_macs_per_token[first] * small / dense)
    assert before.parameters - found.parameters == len(layers) * 2 * (dense - small)
    if share is not None:
        stored = {layer.name: 2 for layer in layers}
        assert expected_parameters(model, stored, rank=2, keep=share) == found.parameters


FEW_BITS = {
    "gated": lambda: (example("mixtral").merged, quantized_example("mixtral").merged),
    "bits by expert": lambda: (example("mixtral").merged, by_expert("mixtral").merged),
    "transposed, biased": lambda: (example("gpt_oss").merged, quantized_example("gpt_oss").merged),
    "ungated": lambda: (example("switch_transformers").merged, quantized_example("switch_transformers").merged),
    "low rank": lambda: (decomposed("mixtral"), quantize_model(copy.deepcopy(decomposed("mixtral")))),
}


@pytest.mark.parametrize("form", FEW_BITS)
def test_experts_in_few_bits_execute_the_products_of_dense_ones_and_one_for_each_group(form: str) -> None:
    """In float64 nothing but these: a matrix is then dequantized at once."""
    dense, quantized = FEW_BITS[form]()
    batch = inputs(dense.config.base_model_type, dense)
    first = moe_layers(dense)[0].name  # what the layers behind the first one see is another
    macs = [account(model, batch).expert_macs_per_token[first] for model in (dense, quantized)]
    exact = account(copy.deepcopy(quantized).double(), batch).expert_macs_per_token[first]
    assert exact == macs[0]
    assert macs[0] < macs[1] <= macs[0] * (1 + 1 / GROUP)
    assert form == "low rank" or macs[1] == macs[0] * (1 + 1 / GROUP)
    assert account(quantized).parameters == account(dense).parameters


def test_bytes_are_those_of_parameters_buffers_and_files(tmp_path: Path) -> None:
    case = example("mixtral")
    half = build("mixtral").bfloat16()
    tensors = [*half.parameters(), *half.buffers()]
    assert account(half).bytes_resident == sum(len(tensor.detach().flatten()) * tensor.itemsize for tensor in tensors)
    assert account(half).bytes_resident > 2 * account(half).parameters
    case.merged.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    found = account(case.merged, folder=tmp_path / "saved")
    assert found.bytes_on_disk == sum(file.stat().st_size for file in (tmp_path / "saved").glob("model-*"))
    assert found.bytes_on_disk == pytest.approx(4 * found.parameters, rel=0.02)
    with pytest.raises(ValueError, match="holds no safetensors file"):
        bytes_on_disk(tmp_path)


def test_speed_is_measured_on_request_only() -> None:
    model = build("mixtral")
    batch = inputs("mixtral", model)
    assert account(model, batch).tokens_per_second is None
    assert account(model, batch, repetitions=2).tokens_per_second > 0
    with pytest.raises(ValueError, match="repetitions=2 needs a batch"):
        account(model, repetitions=2)


def test_a_dense_model_has_no_experts_to_count() -> None:
    model = build("mixtral")
    batch: Batch = inputs("mixtral", model)
    for layer in model.model.layers:
        layer.mlp = nn.Linear(D, D)
    found = account(model, batch)
    assert found.expert_macs_per_token == {}
    assert found.flops_per_token == 2 * (_rest(model) - 4 * E * D)


def test_a_table_shows_what_was_measured_and_the_saving_of_the_last() -> None:
    whole = Costs(1000, 4000, flops_per_token=300.0, expert_macs_per_token={"a": 50.0, "b": 50.0})
    small = replace(whole, parameters=250, bytes_resident=1000, bytes_on_disk=1100)
    table = cost_rows({"before": whole, "merged": whole, "compressed": small})
    assert table == [
        ["", "before", "merged", "compressed", "saved"],
        ["parameters", "1,000", "1,000", "250", "75.0%"],
        ["bytes", "4,000", "4,000", "1,000", "75.0%"],
        ["bytes on disk", "", "", "1,100", ""],
        ["FLOPs per token", "300", "300", "300", "0.0%"],
        ["of them in experts", "200", "200", "200", "0.0%"],
    ]
