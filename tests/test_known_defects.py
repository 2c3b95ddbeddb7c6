"""Defects of public implementations of expert merging, one test for each that concerns merging."""

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from families import build, inputs
from helpers import batches, groups_of, logits, relative_error, tensor, view_of
from layouts import gated
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, collect_statistics, compress, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.methods.alignment import best_permutation
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.grouping import dominant_groups
from hf_mcsmoe.modeling.modeling_mcsmoe import MCSMoEMixtralForCausalLM

EXPERTS_BYTES = 4 * 3 * 24 * 32  # one expert of the tiny Mixtral, in float32


def test_defect_01_a_rank_is_taken_for_an_expert() -> None:
    """Experts by falling saliency are 6, 1, 4, 0, ...; each other expert is like exactly one of the first three."""
    saliency = tensor([4, 7, 1, 0, 5, 2, 9, 3])
    twins = {0: 6, 2: 1, 3: 4, 5: 4, 7: 6}
    similarity = torch.eye(8, dtype=torch.float64)
    for one, other in twins.items():
        similarity[one, other] = similarity[other, one] = 0.9
    groups = dominant_groups(view_of(num_experts=8), saliency, similarity, 3)
    assert sorted(groups.dominant) == [1, 4, 6]
    assert {one: groups.dominant[groups.expert_map[one]] for one in twins} == twins


def _compressed(experts: int = 2) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = build("mixtral")
    return model, compress(model, batches("mixtral", model), MergeConfig(experts=experts, budget="uniform"))


def test_defect_02_the_checkpoint_cannot_be_saved_or_reloads_large_or_random(tmp_path: Path) -> None:
    _, merged = _compressed()
    merged.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == merged.num_parameters()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loaded, info = MCSMoEMixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.num_parameters() == stored
    batch = inputs("mixtral", merged)
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


def test_defect_03_merged_weights_fill_every_slot_and_nothing_gets_smaller(tmp_path: Path) -> None:
    model, merged = _compressed()
    saved = 4 * (8 - 2) * EXPERTS_BYTES
    sizes = []
    for number, each in enumerate((model, merged)):
        each.save_pretrained(tmp_path / str(number))
        content = (tmp_path / str(number) / "model.safetensors").read_bytes()
        sizes.append(len(content) - 8 - int.from_bytes(content[:8], "little"))  # without the header
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in each.parameters()}
        assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in each.parameters())
    assert model.num_parameters() - merged.num_parameters() == saved / 4
    assert sizes[0] - sizes[1] == saved


def test_defect_04_similarity_is_one_of_distances_or_half_or_of_one_batch_or_a_mean_over_batches() -> None:
    model = build("mixtral")
    one, other = inputs("mixtral", model, batch_size=1), inputs("mixtral", model, batch_size=7, seed=1)
    data = [one, other]
    statistics = collect_statistics(model, data)
    keep = [real for batch in data for real in batch["attention_mask"].flatten()]
    for name, tokens in oracle.observe(model, oracle.FAMILIES["mixtral"], data).items():
        whole = oracle.sums(tokens, keep)
        parts = [oracle.sums(tokens[:12], keep[:12]), oracle.sums(tokens[12:], keep[12:])]
        found = REGISTRIES["similarity"]["router_logits"](view_of(num_experts=8, **statistics[name]))
        for i, j in itertools.product(range(8), repeat=2):
            assert found[i, j].item() == pytest.approx(whole.cosine(i, j), abs=1e-5)
        pairs = list(itertools.combinations(range(8), 2))
        wrong = {
            "last batch": [parts[1].cosine(i, j) for i, j in pairs],
            "mean over batches": [(parts[0].cosine(i, j) + parts[1].cosine(i, j)) / 2 for i, j in pairs],
        }
        for values in wrong.values():
            differences = [abs(found[i, j].item() - value) for (i, j), value in zip(pairs, values, strict=True)]
            assert max(differences) > 1e-3, "or the test would not tell"


def test_defect_05_the_assignment_cost_is_in_half_precision() -> None:
    """Inner products of these weights overflow in float16, and only low bits of the sums tell neurons apart."""
    generator = torch.Generator().manual_seed(0)
    base = 90 + torch.randn(1, 64, generator=generator)
    up = (base + 0.5 * torch.randn(12, 64, generator=generator)).half()
    reference = {"up": up, "down": up.T.contiguous()}
    order = torch.randperm(12, generator=generator)
    other = {"up": up[order], "down": up.T[:, order]}
    assert torch.isinf((up.float() @ up.float().T).half()).all(), "or the test would not tell"
    assert torch.equal(best_permutation(reference, other), order.argsort())


def test_defect_05_bfloat16_experts_are_averaged_in_bfloat16() -> None:
    model = build("mixtral").bfloat16()
    options: dict[str, Any] = {"experts": 1, "alignment": "none", "weighting": "uniform"}
    merged = compress(model, batches("mixtral", model), MergeConfig(**options))
    errors = {"merged": 0.0, "floor": 0.0, "naive": 0.0}
    for layer, small in zip(moe_layers(model), moe_layers(merged), strict=True):
        members = [gated(layer.container, index)["up"] for index in range(8)]
        exact = sum(member.double() for member in members) / 8
        naive = torch.zeros_like(members[0])
        for member in members:
            naive += member / 8
        found = gated(small.container, 0)["up"]
        assert found.dtype == naive.dtype == torch.bfloat16
        for kind, value in (("merged", found), ("floor", exact.bfloat16()), ("naive", naive)):
            errors[kind] += relative_error(value, exact) / 4
    assert errors["merged"] <= 1.001 * errors["floor"]
    assert errors["naive"] > 1.3 * errors["floor"]


@pytest.mark.parametrize("counts", [[0] * 8, [9, 0, 0, 0, 0, 0, 0, 0], [10**6, 0, 0, 1, 0, 0, 0, 0]])
def test_defect_06_a_group_without_usage_becomes_zero_and_a_rare_one_shrinks(counts: list[int]) -> None:
    """The second group of four is used never, or once in a million tokens."""
    model = build("mixtral")
    statistics = collect_statistics(model, batches("mixtral", model))
    for layer in statistics.layers.values():
        layer |= {"counts": torch.tensor(counts), "tokens": torch.tensor(10**6 + 1)}
    grouping = groups_of([0, 0, 0, 1, 1, 1, 1, 0], [0, 3])
    plan = plan_merge(model, statistics, MergeConfig(experts=2, grouping=grouping, alignment="none"))
    merged = merge_experts(model, plan)
    for layer, small in zip(moe_layers(model), moe_layers(merged), strict=True):
        members = [gated(layer.container, index) for index in range(8)]
        expected = members[3] if counts[3] else {key: sum(m[key] for m in members[3:7]) / 4 for key in members[0]}
        for role, value in gated(small.container, 1).items():
            assert relative_error(value, expected[role]) < 1e-6


def _counts(name: str, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {layer: sums.counts for layer, sums in collect_statistics(model, [batch]).layers.items()}


def test_defect_07_padding_is_counted() -> None:
    model = build("qwen3_moe")
    batch = inputs("qwen3_moe", model)
    other = copy.deepcopy(batch)
    other["input_ids"][-1, -3:] = 99
    for found in (_counts("qwen3_moe", model, batch), _counts("qwen3_moe", model, other)):
        assert {int(counts.sum()) for counts in found.values()} == {3 * 21}


def test_defect_07_tokens_over_capacity_are_credited_to_expert_0() -> None:
    """Every token of a sequence wants expert 5, which takes three."""
    model = build("switch_transformers")
    for layer in moe_layers(model):
        layer.router.classifier.register_forward_hook(lambda module, arguments, output: output + 1e3 * torch.eye(8)[5])
    batch = inputs("switch_transformers", model)
    for layer in collect_statistics(model, [batch]).layers.values():
        assert layer.counts.tolist() == [0, 0, 0, 0, 0, 2 * 3, 0, 0]
        assert layer.tokens == 2 * 3


def test_defect_07_router_noise_is_left_on() -> None:
    model = build("switch_transformers").train()
    for layer in moe_layers(model):
        layer.router.jitter_noise = 0.9
    batch = inputs("switch_transformers", model)
    first, second = (collect_statistics(model, [batch]) for _ in range(2))
    for name, layer in first.layers.items():
        assert torch.equal(layer["logit_gram"], second[name]["logit_gram"])
    assert model.training


def test_defect_07_the_last_partial_batch_is_lost() -> None:
    model = build("mixtral")
    data = batches("mixtral", model) + [inputs("mixtral", model, batch_size=1)]
    for layer in collect_statistics(model, iter(data)).layers.values():
        assert layer.tokens == 93 + 93 + 9


@pytest.mark.parametrize(
    ("name", "top_k"), [("switch_transformers", 1), ("mixtral", 2), ("deepseek_v3", 3), ("gpt_oss", 4)]
)
def test_defect_07_two_picks_are_counted_whatever_the_model(name: str, top_k: int) -> None:
    model = build(name)
    for layer in moe_layers(model):
        if name == "switch_transformers":
            layer.router.expert_capacity = 99
    batch = inputs(name, model) | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    for counts in _counts(name, model, batch).values():
        assert counts.sum() == top_k * 24


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "deepseek_v3", "gpt_oss", "dbrx", "jetmoe"])
def test_defect_08_every_expert_runs_on_every_token_for_the_statistics(name: str) -> None:
    model = build(name).requires_grad_(False)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # whose products the counter sees
    batch = inputs(name, model, batch_size=8)
    with FlopCounterMode(display=False) as plain:
        logits(model, batch)
    with FlopCounterMode(display=False) as observed:
        collect_statistics(model, [batch])
    gram = sum(2 * 8 * 8 * 96 for _ in moe_layers(model))
    assert plain.get_total_flops() > 20 * gram
    assert observed.get_total_flops() <= plain.get_total_flops() + gram


def test_defect_10_a_last_step_is_needed_and_fails_on_flat_inputs() -> None:
    """The result of the one call is complete, and its blocks and experts take [batch, length, D] and [T, D]."""
    for name in ("mixtral", "switch_transformers"):
        model = build(name)
        merged = compress(model, batches(name, model), MergeConfig(experts=2, budget="uniform"))
        hidden_states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        for layer in moe_layers(merged):
            assert layer.num_experts == 2
            index = torch.randint(8, (10, 1), generator=torch.Generator().manual_seed(1))
            flat = layer.container(hidden_states.view(10, 32), index, torch.ones(10, 1))
            single = [
                layer.container(row[None], index[n : n + 1], torch.ones(1, 1))
                for n, row in enumerate(hidden_states.view(10, 32))
            ]
            torch.testing.assert_close(flat, torch.cat(single))
            assert layer.block(hidden_states).shape == hidden_states.shape


@torch.no_grad()
def test_defect_11_experts_are_masked_by_scaling_their_logits() -> None:
    """All logits are negative, so a logit times a large negative number would win; the router must stay as it was."""
    model = build("gpt_oss")
    for layer in moe_layers(model):
        layer.router.bias.data -= 50
    batch = inputs("gpt_oss", model)
    merged = compress(model, batches("gpt_oss", model), MergeConfig(experts=2, budget="uniform"))
    original, small = moe_layers(model)[0], moe_layers(merged)[0]
    seen: list[tuple[torch.Tensor, ...]] = []
    small.router.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], *output)))
    merged(**batch)
    hidden_states, scores, weights, picks = seen[0]
    assert scores.max() < 0
    base_scores, base_weights, base_picks = original.router(hidden_states)
    assert torch.equal(scores, base_scores)
    assert torch.equal(weights, base_weights)
    stored = torch.tensor(merged.config.mcsmoe["layers"][small.name]["expert_map"])
    assert stored.shape == (8,)
    assert torch.equal(picks, stored[base_picks])
    block = small.block(hidden_states[None])
    output = (block[0] if isinstance(block, tuple) else block)[0]
    for token in range(len(hidden_states)):
        expected = torch.zeros(32)
        for weight, pick in zip(weights[token], picks[token], strict=True):
            expected += weight * _gpt_oss_expert(small.container, int(pick), hidden_states[token])
        torch.testing.assert_close(output[token], expected, atol=1e-4, rtol=1e-4)


def _gpt_oss_expert(experts: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
    gate_up = hidden @ experts.gate_up_proj[index] + experts.gate_up_proj_bias[index]
    gate, up = gate_up[::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    return inner @ experts.down_proj[index] + experts.down_proj_bias[index]


def test_defect_13_grouping_many_experts_takes_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    saliency, rows = torch.rand(128, generator=generator), torch.randn(128, 64, generator=generator)
    started = time.perf_counter()
    dominant_groups(view_of(num_experts=128), saliency, rows @ rows.T, 32)
    assert time.perf_counter() - started < 0.2, "pure Python takes 10.7 s, this takes a millisecond"


@pytest.mark.parametrize("stage", REGISTRIES)
def test_defect_13_a_misspelt_method_selects_another_one(stage: str) -> None:
    for name in REGISTRIES[stage]:
        for wrong in (name[:-1], name.upper(), name + " ", "random-" + name, ""):
            with pytest.raises(ValueError, match=f"Unknown {stage} method"):
                MergeConfig(**{stage: wrong})
