"""High or low precision token by token, the cache of experts and its policies, prediction of the next layer."""

import math
import random
from pathlib import Path

import pytest
import torch
from families import build
from helpers import logits
from transformers import AutoModelForCausalLM, PreTrainedModel
from variant_folders import dense, tokens

from hf_mcsmoe import MergeConfig, QuantizationConfig, compress, moe_layers
from hf_mcsmoe.variants import (
    ExpertCache,
    hobbit,
    lfu,
    lru,
    mix_precision,
    next_layer_accuracy,
    record_trace,
    simulate,
)
from hf_mcsmoe.variants.expert_cache import Moment, Trace, Use
from hf_mcsmoe.variants.mixed_precision_mcsmoe import choose_precision, rounded

GROUP = {"group_size": 8}


def test_a_pick_is_judged_by_the_share_of_larger_ones() -> None:
    weights = torch.tensor([[0.1, 0.6, 0.3], [0.34, 0.33, 0.33], [0.5, 0.5, 0.0]])
    high, low = choose_precision(weights, 0.6, 0.7)
    # Shares before: .9 .0 .6; 0 .34 .67; 0 .5 1.
    assert high.tolist() == [[False, True, True], [True, True, False], [True, True, False]]
    assert low.tolist() == [[False, False, False], [False, False, True], [False, False, False]]
    assert choose_precision(weights * 7, 0.6, 0.7)[0].equal(high), "the weights' scale must not matter"
    assert choose_precision(weights, 0.0, 1.0)[0].sum(-1).tolist() == [1, 1, 1], "the first is always high"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_all_in_high_precision_is_the_model_bit_for_bit(name: str) -> None:
    model = build(name)
    batch = tokens(model)
    expected = logits(model, batch)
    assert torch.equal(logits(mix_precision(model, t1=1.0, t2=1.0, **GROUP), batch), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_low_picks_are_those_of_rounded_weights_and_the_last_are_skipped(name: str, implementation: str) -> None:
    model = build(name)
    model.set_experts_implementation(implementation)
    experts = next(module for module in model.modules() if "is_transposed" in vars(module))
    axis, torch_rows = (1 if experts.is_transposed else 2), torch.randn(9, 32)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(9)])
    weights = torch.tensor([0.6, 0.3, 0.1]).expand(9, 3).contiguous()
    parts = [_one_pick(experts, torch_rows, index, weights, slot) for slot in range(3)]
    originals = {key: value.clone() for key, value in experts.state_dict().items()}
    for key, value in experts.named_parameters():
        if "bias" not in key:
            value.data = rounded(value.data, 4, 8, axis)
    low = _one_pick(experts, torch_rows, index, weights, 1)
    experts.load_state_dict(originals)
    assert not torch.allclose(low, parts[1], atol=1e-4)
    mix_precision(model, t1=0.5, t2=0.7, bits=4, **GROUP)
    torch.testing.assert_close(experts(torch_rows, index, weights), parts[0] + low, atol=1e-4, rtol=1e-4)
    experts.precision_options["bits"] = 0
    torch.testing.assert_close(experts(torch_rows, index, weights), parts[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def _one_pick(
    experts: torch.nn.Module, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, slot: int
) -> torch.Tensor:
    return experts(rows, index[:, slot : slot + 1], weights[:, slot : slot + 1])


def test_rounding_keeps_what_lies_on_levels_and_is_off_by_half_a_level_at_most() -> None:
    exact = torch.tensor([[-7.0, 0.0, 3.0, 7.0], [1.4, -0.2, 0.6, 0.0]])
    torch.testing.assert_close(rounded(exact, 4, 4), exact)
    weight = torch.randn(3, 6, 8)
    for axis in (1, 2):
        found = rounded(weight, 4, 2, axis)
        scale = weight.movedim(axis, -1).unflatten(-1, (-1, 2)).abs().amax(-1) / 7
        error = (found - weight).movedim(axis, -1).unflatten(-1, (-1, 2)).abs().amax(-1)
        assert (error <= scale / 2 + 1e-6).all()


def test_a_reloaded_model_chooses_alike(tmp_path: Path) -> None:
    model = mix_precision(build("mixtral"), t1=0.3, t2=0.9, bits=2, **GROUP)
    batch = tokens(model)
    assert not torch.allclose(logits(model, batch), logits(build("mixtral"), batch), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_the_policy_weighs_its_four_terms() -> None:
    use, moment = Use(last=6, uses=4, high=2), Moment(step=8, layer=3, num_layers=4)
    # 6/8, 4/8, 2/8; layer 1 comes two layers after layer 3 of four.
    assert hobbit((0.1, 0.2, 0.3, 0.4))((1, 0), use, moment) == pytest.approx(0.075 + 0.1 + 0.075 + 0.4 * 0.5)
    assert (lru((1, 0), use, moment), lfu((1, 0), use, moment)) == (6, 4)
    assert hobbit((0, 0, 0, 1))((3, 0), use, moment) > hobbit((0, 0, 0, 1))((2, 0), use, moment)


@pytest.mark.parametrize("priority", [lru, lfu, hobbit()])
@pytest.mark.parametrize("capacity", [0, 1, 3, 12])
def test_no_capacity_gives_a_wrong_expert(priority: object, capacity: int) -> None:
    draw, cache, loaded = random.Random(0), ExpertCache(capacity, priority, 3), []
    for step in range(200):
        cache.step += 1
        wanted = [(step % 3, draw.randrange(4)) for _ in range(draw.randrange(1, 6))]
        held = dict(cache.kept)
        for key in wanted:
            cache.tell(key, is_high=True)
        found = cache.fetch(wanted, lambda key: loaded.append(key) or f"expert {key}")
        assert found == {key: f"expert {key}" for key in wanted}
        assert len(cache.kept) <= capacity
        assert all(key in cache.kept for key in wanted if key in held), "evicted while it was needed"
    assert cache.misses == len(loaded)
    assert capacity < 12 or len(loaded) == len(set(loaded))


def test_costs_of_a_sequence_are_counted_by_hand() -> None:
    index = [torch.tensor([[0, 1], [0, 2], [1, 0], [3, 2]])]
    trace = Trace(index, [torch.tensor([[0.8, 0.2]]).expand(4, 2)])
    # Two kept: 0 1 loaded; 2 for 1; 1 for 2; both of 3 2.
    assert simulate([trace], lru, high=2) == pytest.approx(6 / 4)
    # In low precision the second picks, unless kept in high: 0, low 1; low 2; 1 and 0 is there; 3 and low 2 is there.
    assert simulate([trace], lru, high=2, low=2, t1=0.5) == pytest.approx((3 + 0.25 * 2) / 4)
    assert simulate([trace], lru, high=4) == pytest.approx(4 / 4)


def test_a_trace_has_the_picks_of_every_layer() -> None:
    model = build("mixtral")
    batch = tokens(model)
    trace = record_trace(model, batch)
    assert [tuple(index.shape) for index in trace.index] == [(24, 2)] * 4
    output = model(**batch, output_router_logits=True)
    for index, routed in zip(trace.index, output.router_logits, strict=True):
        assert torch.equal(index, routed.topk(2).indices)


def _alike(model: PreTrainedModel) -> PreTrainedModel:
    """Let the layers add nothing and route alike."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.experts.down_proj)
        layer.mlp.gate.load_state_dict(model.model.layers[0].mlp.gate.state_dict())
        layer.post_attention_layernorm.load_state_dict(model.model.layers[0].post_attention_layernorm.state_dict())
    return model


def test_the_next_layer_is_predicted_where_layers_route_alike() -> None:
    assert next_layer_accuracy(_alike(build("mixtral")), tokens(build("mixtral")), ahead=2) == [1.0, 1.0]
    assert max(next_layer_accuracy(build("mixtral"), tokens(build("mixtral")))) < 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "order": (lambda: mix_precision(build("mixtral"), t1=0.9, t2=0.6), "t1=0.9 and t2=0.6"),
        "bits": (lambda: mix_precision(build("mixtral"), bits=5), "or 0 to skip, not 5"),
        "group": (lambda: mix_precision(build("mixtral"), group_size=7), "divide the 32 inputs of gate_up_proj"),
        "zero": (lambda: mix_precision(build("mixtral"), group_size=0), "1 or more, not 0"),
        "half": (lambda: mix_precision(build("mixtral"), group_size=1.5), "group_size must be a whole number"),
        "nan": (lambda: mix_precision(build("mixtral"), t1=math.nan), "not t1=nan and t2=0.9"),
        "nan weights": (lambda: hobbit((0.5, 0.5, math.nan, 0)), "0 or more and sum to 1"),
        "nan capacity": (lambda: ExpertCache(math.nan, lru, 2), "not nan and 2"),
        "dense": (lambda: mix_precision(dense()), "no experts of the library"),
        "weights": (lambda: hobbit((0.5, 0.5, 0.5, 0)), "sum to 1"),
        "capacity": (lambda: ExpertCache(-1, lru, 2), "not -1 and 2"),
        "trace": (lambda: record_trace(dense(), tokens(dense())), "no experts of the library"),
        "ahead": (lambda: next_layer_accuracy(build("mixtral"), {}, 4), "from 1 to 3 for 4 layers .* not 4"),
        "empty": (lambda: simulate([], lru, high=1), "one token or more"),
    }.values(),
)  # fmt: skip
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bits_for_good_are_fewest_where_gate_times_output_adds_up_to_least() -> None:
    model = build("mixtral").requires_grad_(False)
    generator, name = torch.Generator().manual_seed(0), moe_layers(model)[0].name
    ids = torch.randint(1, 128, (8, 32), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls: list[tuple[torch.Tensor, ...]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, given: calls.append(given))
    model(**batch)
    hook.remove()
    experts, sums = model.get_submodule(name), [0.0] * 8
    hidden, index, weights = calls[0]
    for token, picks in enumerate(index.tolist()):
        for slot, expert in enumerate(picks):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            output = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            sums[expert] += float(weights[token, slot] * output.norm())
    least = sorted(sorted(range(8), key=sums.__getitem__)[:4])
    sizes = {}
    for low_bits in (None, 2):
        options = {"low_bits": low_bits, "low_share": 0.5, "method": "nearest", "group_size": 8}
        kept = compress(
            build("mixtral"), [batch], MergeConfig(experts=1.0), quantization=QuantizationConfig(bits=4, **options)
        )
        sizes[low_bits] = sum(value.nbytes for value in kept.state_dict().values())
    bits = kept.config.mcsmoe["layers"][name]["quantized"]["down_proj"]["bits"]
    assert [expert for expert, number in enumerate(bits) if number == 2] == least
    assert sizes[2] < sizes[None]
