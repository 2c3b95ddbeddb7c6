"""Soft merging by segments: by hand, where it is another model, what it may know, and what a prompt is merged into."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Batch, logits
from merged import tokenizer
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, PreTrainedModel
from variant_folders import dense, tokens

from hf_mcsmoe.variants import add_momentum, merge_for_prompt, soft_merge, upcycle_dense
from hf_mcsmoe.variants.lory_mcsmoe import Segments

# The segments of most tests; texts have eleven tokens, so that the last one is not full.
LENGTH, SIZE = 4, 11
PROMPT = "w50 w51 w52 w60 w61 w90"


def _ids(rows: int = 1, size: int = SIZE) -> torch.Tensor:
    return torch.randint(48, 128, (rows, size), generator=torch.Generator().manual_seed(1))


def _mixtral_ffn(weights: dict[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    gate, up = (weights["gate_up_proj"] @ value).chunk(2)
    return weights["down_proj"] @ (silu(gate) * up)


def _gpt_oss_ffn(weights: dict[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    inner = value @ weights["gate_up_proj"] + weights["gate_up_proj_bias"]
    gate, up = inner[0::2].clamp(max=7), inner[1::2].clamp(-7, 7)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ weights["down_proj"] + weights["down_proj_bias"]


def _by_hand(block: Any, router: Any, hidden: torch.Tensor, text: torch.Tensor, ffn: Any) -> torch.Tensor:
    """Compute the output of the experts of one layer, row by row, segment by segment, expert by expert."""
    output = torch.zeros_like(hidden)
    for row in range(len(hidden)):
        places = [place for place in range(hidden.shape[1]) if text[row, place]]
        segments = [places[start : start + LENGTH] for start in range(0, len(places), LENGTH)]
        for number, segment in enumerate(segments):
            before = segments[max(number - 1, 0)]
            mean = sum(hidden[row, place] for place in before) / len(before)
            scores = router.weight @ mean + (0 if router.bias is None else router.bias)
            scores = (scores - scores.max()).exp()
            merged = {
                name: sum(score * expert for score, expert in zip(scores / scores.sum(), stacked, strict=True))
                for name, stacked in block.experts.named_parameters()
            }
            for place in segment:
                output[row, place] = ffn(merged, hidden[row, place])
    return output


@pytest.mark.parametrize("padding", ["none", "left", "right", "inside"])
@pytest.mark.parametrize(("name", "ffn"), {"mixtral": _mixtral_ffn, "gpt_oss": _gpt_oss_ffn}.items())
def test_a_layer_computes_what_loops_do(name: str, ffn: Any, padding: str) -> None:
    model = soft_merge(build(name), segment_length=LENGTH)
    text = torch.ones(2, SIZE, dtype=torch.long)
    text[1, {"none": [], "left": [0, 1], "right": [9, 10], "inside": [3, 6]}[padding]] = 0
    block = model.model.layers[1].mlp
    router = block.gate if name == "mixtral" else block.router
    router.bias = dict(router.named_parameters()).get("bias")
    seen: dict[str, torch.Tensor] = {}
    router.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0], logits=out[0]))
    block.experts.register_forward_hook(lambda _, __, out: seen.update(output=out))
    with torch.no_grad():
        model(_ids(2), attention_mask=text)
        hidden = seen["hidden"].unflatten(0, (2, SIZE))
        expected = _by_hand(block, router, hidden, text, ffn)
    found = seen["output"].unflatten(0, (2, SIZE))
    torch.testing.assert_close(found[text == 1], expected[text == 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_a_router_that_is_sure_computes_one_expert(name: str) -> None:
    model = build(name)
    experts = next(module for path, module in model.named_modules() if path.endswith("experts"))
    soft_merge(model, segment_length=LENGTH)
    hidden = torch.randn(1, 8, experts.down_proj.shape[1 if name != "gpt_oss" else 2])
    weights = torch.zeros(8, len(experts.down_proj))
    weights[:4, 5] = weights[4:, 2] = 1
    index = torch.arange(weights.shape[1]).expand_as(weights)
    experts.segments = Segments(hidden.shape[:2], LENGTH, None)
    found = experts(hidden[0], index, weights)
    library = type(experts).generated_from.forward
    picked = torch.tensor([5] * 4 + [2] * 4)[:, None]
    expected = library(experts, hidden[0], picked, torch.ones(8, 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_equal_experts_are_the_dense_model() -> None:
    base = dense()
    model = soft_merge(upcycle_dense([base] * 4, "mixtral"), segment_length=LENGTH)
    torch.testing.assert_close(logits(model, tokens(base)), logits(base, tokens(base)), atol=1e-4, rtol=1e-4)


def test_what_comes_later_is_known_in_the_first_segment_alone() -> None:
    model = soft_merge(build("mixtral"), segment_length=LENGTH)
    ids = _ids()
    before = logits(model, {"input_ids": ids})
    for place in range(SIZE):
        changed = ids.clone()
        changed[0, place] = 48 + (ids[0, place] - 47) % 80
        is_same = (logits(model, {"input_ids": changed}) == before).all(dim=-1)[0]
        known = 0 if place < LENGTH else place
        assert is_same[:known].all()
        assert not is_same[known:].any()


def test_the_first_segment_gives_the_routers_no_gradient() -> None:
    model = soft_merge(build("mixtral"), segment_length=LENGTH)
    for end, is_zero in ((LENGTH, True), (LENGTH + 1, False)):
        model.zero_grad()
        model(_ids()).logits[:, :end].logsumexp(-1).sum().backward()
        found = [layer.mlp.gate.weight.grad.abs().max() == 0 for layer in model.model.layers]
        assert found == [is_zero] * len(found)
        assert all(layer.mlp.experts.down_proj.grad.any() for layer in model.model.layers)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_row_is_the_same_alone_and_beside_others_whatever_its_padding(name: str) -> None:
    model = soft_merge(build(name), segment_length=LENGTH)
    ids = _ids(3)
    alone = logits(model, {"input_ids": ids[:1]})[0]
    for start in (0, 3, 5):
        rows = torch.full((3, SIZE + 5), 7)
        mask = torch.zeros_like(rows)
        for row, place in enumerate((start, 5 - start, 0)):
            rows[row, place : place + SIZE], mask[row, place : place + SIZE] = ids[row], 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        found = logits(model, {"input_ids": rows, "attention_mask": mask, "position_ids": positions})[0]
        torch.testing.assert_close(found[start : start + SIZE], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_batches_before_one_backward_keep_their_own_padding_in_checkpoints(use_reentrant: bool) -> None:
    masks = torch.ones(2, 2, SIZE, dtype=torch.long)
    masks[0, 0, :3] = masks[1, 1, :2] = 0
    gradients = []
    for checkpointing in (False, True):
        model = soft_merge(build("mixtral"), segment_length=LENGTH).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        sum(model(_ids(2), attention_mask=mask).logits.logsumexp(-1).mean() for mask in masks).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_generation_keeps_what_was_merged_for_the_prompt() -> None:
    model = soft_merge(build("mixtral"), segment_length=LENGTH)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    expected = merge_for_prompt(model, PROMPT, tokenizer()).generate(ids, **options)
    padded = torch.cat([torch.full((2, 3), 7), torch.cat([ids, _ids(size=ids.shape[1])])], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = {
        "cached": model.generate(ids, **options),
        "whole": model.generate(ids, use_cache=False, **options),
        "beside another": model.generate(padded, attention_mask=mask, **options),
        "by embeddings": model.generate(inputs_embeds=model.model.embed_tokens(ids), **options),
    }
    for name, output in found.items():
        assert torch.equal(output.sequences[0, -6:], expected.sequences[0, -6:]), name
        for each, step in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(each[:1], step, atol=1e-3, rtol=1e-3)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    merged = merge_for_prompt(model, PROMPT, tokenizer())
    assert torch.equal(model.generate(ids, **beams), merged.generate(ids, **beams))
    assert torch.equal(model(ids).logits, model(ids).logits), "something of the prompt is left"
    assert not torch.allclose(logits(model, {"input_ids": ids}), logits(merged, {"input_ids": ids}), atol=1e-3)


def test_a_prompt_of_one_segment_is_computed_as_by_the_model_merged_for_it() -> None:
    model = soft_merge(build("qwen3_moe"))
    batch = tokenizer()(PROMPT, return_tensors="pt")
    found = logits(merge_for_prompt(model, PROMPT, tokenizer()), {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(found, logits(model, {"input_ids": batch["input_ids"]}), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "cls"),
    {
        "mixtral": "MistralForCausalLM",
        "qwen3_moe": "Qwen3ForCausalLM",
        "flex_olmo": "Olmo2ForCausalLM",
        "olmoe": "OlmoeForCausalLM",
    }.items(),
)
def test_any_model_is_merged_by_the_mean_of_what_its_routers_say(name: str, cls: str, tmp_path: Path) -> None:
    model = build(name)
    batch: Batch = {"input_ids": tokenizer()(PROMPT, return_tensors="pt")["input_ids"]}
    before = copy.deepcopy(model.state_dict())
    found = merge_for_prompt(model, PROMPT, tokenizer())
    assert type(found).__name__ == cls
    for field in ("sliding_window", "rope_parameters", "max_position_embeddings", "eos_token_id"):
        assert found.config.to_dict().get(field) == model.config.to_dict().get(field), field
    # The same of a copy of the model with nothing but the merged expert in each place, whoever is picked.
    oracle = copy.deepcopy(model)
    for layer, scores in zip(
        oracle.model.layers, model(**batch, output_router_logits=True).router_logits, strict=True
    ):
        layer.mlp.gate.norm_topk_prob = True
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        for stacked in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            stacked.data[:] = sum(shares[:, expert].mean() * stacked[expert] for expert in range(len(stacked)))
    torch.testing.assert_close(logits(found, tokens(model)), logits(oracle, tokens(model)), atol=1e-4, rtol=1e-4)
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(found, batch))
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_a_saved_model_is_merged_with_the_tokenizer_beside_it(tmp_path: Path) -> None:
    model = soft_merge(build("mixtral"), segment_length=LENGTH)
    model.save_pretrained(tmp_path, tokenizer=tokenizer())
    expected = merge_for_prompt(model, PROMPT, tokenizer()).state_dict()
    for options in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        torch.testing.assert_close(merge_for_prompt(loaded, PROMPT).state_dict(), expected)


def test_layers_that_are_dense_stay_so_where_they_are_as_wide() -> None:
    model = build("qwen3_moe")
    config = copy.deepcopy(model.config)
    config.mlp_only_layers, config.intermediate_size = [1], config.moe_intermediate_size
    model = AutoModelForCausalLM.from_config(config)
    found = merge_for_prompt(model, PROMPT, tokenizer()).model.layers[1].mlp
    torch.testing.assert_close(found.state_dict(), model.model.layers[1].mlp.state_dict())
    model.config.intermediate_size += 8
    with pytest.raises(ValueError, match="a dense model has one width"):
        merge_for_prompt(model, PROMPT, tokenizer())


def _soft() -> PreTrainedModel:
    return soft_merge(build("mixtral"), segment_length=LENGTH)


def _padded() -> Batch:
    mask = torch.ones(2, SIZE, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": _ids(2), "attention_mask": mask}


def _continued() -> None:
    model = _soft()
    model(_ids(), past_key_values=model(_ids(), use_cache=True).past_key_values)


REFUSED = {
    "length": (lambda: soft_merge(build("mixtral"), segment_length=0), "1 or more, not 0"),
    "nan": (lambda: soft_merge(build("mixtral"), segment_length=math.nan), "segment_length must be a whole number"),
    "half": (lambda: soft_merge(build("mixtral"), segment_length=2.5), "1 or more, not 2.5"),
    "dense": (lambda: soft_merge(dense()), "no layers with a block of experts"),
    "layout": (lambda: soft_merge(build("dbrx")), "serves Mixtral, Qwen3-MoE, OLMoE"),
    "twice": (lambda: soft_merge(_soft()), "neither of a compressed one nor of another"),
    "cache": (_continued, "call generate, or give the whole text"),
    "mask": (lambda: _soft()(_ids(), attention_mask=torch.ones(1, 1, SIZE, SIZE)), "give such a mask"),
    "static": (
        lambda: _soft().generate(**_padded(), cache_implementation="static", max_new_tokens=3),
        "a cache that is not static",
    ),
    "chunks": (lambda: _soft().generate(_ids(), prefill_chunk_size=4, max_new_tokens=3), "reads 4 tokens .* of 11"),
    "assistant": (
        lambda: _soft().generate(_ids(size=4).repeat(1, 3), prompt_lookup_num_tokens=3, max_new_tokens=8),
        "reads 15 tokens of a prompt of 12",
    ),
    "family": (lambda: merge_for_prompt(build("qwen2_moe"), PROMPT, tokenizer()), "no dense one can be made"),
    "variant": (lambda: merge_for_prompt(add_momentum(build("mixtral")), PROMPT, tokenizer()), "plain or changed by"),
    "headless": (lambda: merge_for_prompt(build("mixtral").model, PROMPT, tokenizer()), "has no head"),
    "empty": (lambda: merge_for_prompt(build("mixtral"), "", tokenizer()), "'' has no tokens"),
    "tokenizer": (lambda: merge_for_prompt(build("mixtral"), PROMPT), "give one as `tokenizer`"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_family_whose_layers_are_not_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _soft()
    layer = type(model.model.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, states, text_mask, **others: forward(self, states, **others))
    with pytest.raises(ValueError, match=re.escape("soft_merge does not serve this family")):
        logits(model, tokens(model))
