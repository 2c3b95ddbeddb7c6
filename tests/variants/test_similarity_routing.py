"""Routers that average over tokens: against a loop over tokens, and blind to what a token may not see."""

from typing import Any

import pytest
import torch
from families import build
from helpers import logits
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from variant_folders import dense, tokens
from without_package import recorded

from hf_mcsmoe.variants import add_attention_routing, add_momentum, add_similarity_routing

DECODERS = ["mixtral", "qwen3_moe", "olmoe"]
KINDS = ["similarity", "attention"]


def _changed(name: str, kind: str, **options: Any) -> PreTrainedModel:
    """Return a tiny model of a family with routers that average, and matrices W_s that are not the identity."""
    model = build(name)
    if kind == "attention":
        model.set_attn_implementation("eager")
        return add_attention_routing(model, **({"sigma": 0.8} | options))
    add_similarity_routing(model, **({"tau": 0.7} | options))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "similarity" in key:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _router(model: PreTrainedModel) -> Any:
    return model.model.layers[1].mlp.get_submodule("router" if "openai" in model.config.base_model_type else "gate")


def _seen(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the second layer's router got and gave, and its attention's weights."""
    seen: dict[str, Any] = {}
    layer = model.model.layers[1]
    hooks = [
        _router(model).register_forward_hook(lambda _, args, out: seen.update(inputs=args[0], outputs=out)),
        layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(attention=out[1])),
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def _neighbours(batch: dict[str, torch.Tensor], row: int, place: int, is_causal: bool) -> list[int]:
    """Return which tokens of its row a token may see."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    length = batch["input_ids"].shape[1]
    seen = [other for other in range(length) if mask is None or mask[row, other]]
    if is_causal:
        seen = [other for other in seen if other <= place]
    if positions is not None:
        start = max(other for other in range(place + 1) if positions[row, other] == 0)
        seen = [other for other in seen if other >= start]
    return seen


def _shares(model: PreTrainedModel, seen: dict[str, Any], row: int, place: int, others: list[int]) -> torch.Tensor:
    """Return S of one token over those that it may see."""
    options, length = _router(model).routing_options, seen["length"]
    inputs = seen["inputs"].reshape(-1, length, seen["inputs"].shape[-1])[row].double()
    own, known = inputs[place], inputs[others]
    if options["kind"] == "similarity":
        matrix = _router(model).similarity.weight.detach().double()
        if options["normalize"]:
            own, known = own / own.norm(), known / known.norm(dim=-1, keepdim=True)
        return torch.tensor([float(own @ matrix @ other) / options["tau"] for other in known]).double().softmax(0)
    weights = seen["attention"][row].double()
    entropies = [
        [-sum(float(p * p.log()) for p in weights[head, other] if p > 0) for other in others]
        for head in range(len(weights))
    ]
    head = min(range(len(weights)), key=lambda head: sum(entropies[head]))
    likelihood = [1.0] * len(others)
    if (sigma := options["sigma"]) is not None:
        apart = [own / own.norm() - other / other.norm() for other in known]
        likelihood = [float((-(gap @ gap) / (2 * sigma**2)).exp()) for gap in apart]
    shares = weights[head, place, others] * torch.tensor(likelihood).double()
    return shares / shares.sum()


BATCHES: dict[str, dict[str, torch.Tensor]] = {
    "whole": {},
    "padded left": {"attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5])},
    "padded right": {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [*range(7), 0, 1]])},
}
CASES = [
    *((name, kind, "padded left", {}) for name in (*DECODERS, "openai_privacy_filter") for kind in KINDS),
    *(("mixtral", kind, batch, {}) for batch in ("whole", "padded right", "packed") for kind in KINDS),
    ("mixtral", "similarity", "whole", {"normalize": False, "tau": 30.0}),
    ("mixtral", "attention", "whole", {"sigma": None}),
]


@pytest.mark.parametrize(("name", "kind", "case", "options"), CASES)
def test_routers_pick_by_what_a_loop_over_tokens_finds(name: str, kind: str, case: str, options: dict) -> None:
    model = _changed(name, kind, **options)
    ids = torch.randint(50, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, **BATCHES[case]}
    if case == "packed":
        batch["use_cache"] = False
    seen = _seen(model, batch) | {"length": 9}
    router = _router(model)
    flat = seen["inputs"].reshape(-1, seen["inputs"].shape[-1]).double()
    bias = dict(router.named_parameters()).get("bias", torch.zeros(1))
    plain = (flat @ router.weight.double().T + bias.double()).softmax(-1).reshape(2, 9, -1).detach()
    log, weights, index = (part.detach().reshape(2, 9, -1) for part in seen["outputs"])
    is_encoder = "openai" in name
    for row in range(2):
        for place in range(9):
            if "attention_mask" in batch and not batch["attention_mask"][row, place]:
                continue
            others = _neighbours(batch, row, place, is_causal=not is_encoder)
            shares = _shares(model, seen, row, place, others)
            mixed = sum(share * plain[row, other] for share, other in zip(shares, others, strict=True))
            torch.testing.assert_close(log[row, place].exp().double(), mixed, atol=1e-5, rtol=1e-4)
            best = sorted(range(len(mixed)), key=lambda expert: -mixed[expert])[: index.shape[-1]]
            assert index[row, place].tolist() == best
            picked = mixed[best] / (mixed[best].sum() if model.config.to_dict().get("norm_topk_prob", True) else 1)
            expected = picked / len(best) if is_encoder else picked
            torch.testing.assert_close(weights[row, place].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2"])
def test_where_each_token_sees_itself_alone_nothing_changes(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    batch = tokens(model)
    expected, shapes = logits(model, batch), recorded(model, batch)
    for changed in (add_similarity_routing(build(name), tau=1e-4), _changed(name, "attention", sigma=0.01)):
        torch.testing.assert_close(logits(changed, batch), expected, atol=1e-4, rtol=1e-4)
        assert recorded(changed, batch) == shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_a_later_one_another_row_or_padding(name: str, kind: str) -> None:
    model = _changed(name, kind)
    ids = torch.randint(50, 120, (2, 10), generator=torch.Generator().manual_seed(0))
    expected = logits(model, {"input_ids": ids})
    assert not torch.allclose(expected, logits(build(name), {"input_ids": ids}), atol=1e-2)
    later, other, padded = ids.clone(), ids.clone(), torch.cat([torch.full((2, 3), 7), ids], dim=1)
    later[:, -1] = 49
    other[1] = other[1].flip(0)
    torch.testing.assert_close(logits(model, {"input_ids": later})[:, :-1], expected[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, {"input_ids": other})[0], expected[0], atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = logits(model, {"input_ids": padded, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1})
    torch.testing.assert_close(found[:, 3:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_are_apart(kind: str) -> None:
    model = _changed("mixtral", kind)
    ids = torch.randint(50, 120, (1, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = logits(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    apart = [logits(model, {"input_ids": part}) for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_texts_are_one_as_they_are_to_attention_and_may_come_in_parts(kind: str) -> None:
    model = _changed("mixtral", kind)
    ids = torch.randint(50, 120, (1, 9), generator=torch.Generator().manual_seed(0))
    positions, cache = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), DynamicCache(config=model.config)
    whole = logits(model, {"input_ids": ids, "position_ids": positions, "use_cache": True})
    parts = [
        logits(model, {"input_ids": ids[:, part], "position_ids": positions[:, part], "past_key_values": cache})
        for part in (slice(0, 6), slice(6, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_that_without_one(name: str, kind: str) -> None:
    model = _changed(name, kind)
    ids = torch.randint(50, 120, (2, 7), generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [0, 0] + [1] * 5])}
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    for way in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached, whole = (
            model.generate(**prompt, **way, **options, use_cache=use_cache) for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, whole.sequences)
        torch.testing.assert_close(cached.logits, whole.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_cropped_repeated_or_picked_from_goes_on_as_it_should(kind: str) -> None:
    model = _changed("mixtral", kind)
    ids = torch.randint(50, 120, (2, 10), generator=torch.Generator().manual_seed(0))
    expected = logits(model, {"input_ids": ids})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache)
        cache.crop(-3)
        found = model(input_ids=ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, 5:], atol=1e-4, rtol=1e-4)
        cache.crop(-5)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(input_ids=ids[[1, 0], 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[[1, 0], 5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_checkpoints_are_the_same_and_reach_the_matrices(kind: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _changed("mixtral", kind).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**tokens(model)).logits.logsumexp(-1).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    matrices = [gradient for name, gradient in gradients[0].items() if "similarity" in name]
    assert len(matrices) == (4 if kind == "similarity" else 0)
    assert all(gradient.abs().max() > 0 for gradient in matrices)


def _eager(name: str) -> PreTrainedModel:
    model = build(name)
    model.set_attn_implementation("eager")
    return model


def _use(**inputs: Any) -> Any:
    model = _changed("mixtral", "similarity")
    return model(**{"input_ids": torch.full((1, 4), 60), **inputs})


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), 1e-45, 1e-25, 1e200])
def test_temperatures_that_float32_cannot_divide_by_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="tau must be from 1e-06 to 1e"):
        add_similarity_routing(build("mixtral"), wrong)
    with pytest.raises(ValueError, match=r"sigma must be from 0\.001 to 1e"):
        add_attention_routing(_eager("mixtral"), wrong)


@pytest.mark.parametrize("is_least", [True, False])
def test_temperatures_at_their_bounds_give_finite_logits(is_least: bool) -> None:
    changed = [
        add_similarity_routing(build("mixtral"), 1e-6 if is_least else 1e12, normalize=normalize)
        for normalize in (True, False)
    ]
    changed.append(add_attention_routing(_eager("mixtral"), 1e-3 if is_least else 1e6))
    for model in changed:
        assert logits(model, tokens(model)).isfinite().all()


def _foreign_cache() -> DynamicCache:
    base = build("mixtral")
    return base(input_ids=torch.full((1, 3), 60), use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "tau": (lambda: add_similarity_routing(build("mixtral"), 0.0), r"from 1e-06 to 1e\+12, not 0.0"),
        "sigma": (lambda: add_attention_routing(_eager("mixtral"), -1.0), "or None for the attention alone, not -1.0"),
        "sdpa": (lambda: add_attention_routing(build("mixtral")), 'attn_implementation="eager"'),
        "sdpa later": (
            lambda: _changed("mixtral", "attention").set_attn_implementation("sdpa"), 'attn_implementation="eager"',
        ),
        "sigmoid": (lambda: add_similarity_routing(build("deepseek_v3")), "does something else than to pick"),
        "correction": (lambda: add_similarity_routing(build("ernie4_5_moe")), "does something else than to pick"),
        "seq2seq": (lambda: add_similarity_routing(build("switch_transformers")), "has two stacks of layers"),
        "no gate": (lambda: add_similarity_routing(build("jetmoe")), "has experts without a gate"),
        "no attention": (lambda: add_attention_routing(_eager("jamba")), "has no attention before its experts"),
        "dense": (lambda: add_similarity_routing(dense()), "has no layers with experts"),
        "twice": (lambda: add_similarity_routing(add_momentum(build("mixtral"))), "nor of another variant"),
        "mask": (lambda: _use(attention_mask=torch.ones(1, 1, 4, 4)), "attention_mask as a tensor"),
        "short mask": (
            lambda: _use(attention_mask=torch.ones(1, 4), past_key_values=_use().past_key_values),
            "tells of 4 tokens, and with the cache's there are 8",
        ),
        "cache of another": (lambda: _use(past_key_values=_foreign_cache()), "holds 3 tokens, of which the routers"),
        "static": (
            lambda: _changed("mixtral", "similarity").generate(
                torch.full((1, 4), 60), max_new_tokens=2, cache_implementation="static"),
            "lies in a DynamicCache, not a StaticCache",
        ),
        "alone": (lambda: _router(_changed("mixtral", "similarity"))(torch.zeros(4, 32)), "outside of its layer"),
        "layer alone": (lambda: _changed("mixtral", "similarity").model.layers[0](torch.zeros(1, 4, 32)), "not told"),
    }.values(),
)  # fmt: skip
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["deepseek_v3", "jetmoe"])
def test_a_model_that_is_refused_is_left_alone(name: str) -> None:
    model = build(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="similarity routing does not serve"):
        add_similarity_routing(model)
    assert [type(module) for module in model.modules()] == before
    assert not any(isinstance(module, nn.Module) and module._forward_pre_hooks for module in model.modules())
