"""Statistics of models: equal to a loop over the tokens that count, and the model as it was before."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import Family, build, families, inputs
from helpers import Batch, batches, state
from offloaded import OFFLOADED
from oracle import FAMILIES, observe, sums
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, RoutingStatistics, collect_statistics, merge_experts, moe_layers, plan_merge
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

EVERY = [family for family in families() if family.name not in ("nllb_moe", "doge")]
# Picks that reach no routed expert: capacity, a skipped expert, identity experts.
FEWER_PICKS = ("switch_transformers", "zaya", "longcat_flash")


BASIC = ("counts", "gate_sum", "logit_gram", "tokens")


def _collect(name: str, model: PreTrainedModel, number: int = 2) -> RoutingStatistics:
    return collect_statistics(model, batches(name, model, number), BASIC)


def _assert_close(left: RoutingStatistics, right: RoutingStatistics, rtol: float = 1e-5) -> None:
    assert left.layers.keys() == right.layers.keys()
    for name, layer in left.layers.items():
        torch.testing.assert_close(dict(layer), dict(right[name]), rtol=rtol, atol=rtol)


def _assert_equal(left: RoutingStatistics, right: RoutingStatistics) -> None:
    assert left.fingerprint == right.fingerprint
    _assert_close(left, right, rtol=0)


def _cut(batch: Batch, length: int) -> Batch:
    return {key: value[:, :length] for key, value in batch.items()}


def _with_labels(batch: Batch) -> Batch:
    labels = torch.arange(batch["attention_mask"].numel()).view_as(batch["attention_mask"]) % 7
    return {**batch, "labels": labels.masked_fill(labels < 3, -100)}


def _with_decoder_mask(batch: Batch) -> Batch:
    mask = torch.ones_like(batch["decoder_input_ids"])
    mask[::3, -4:] = 0
    return {**batch, "decoder_attention_mask": mask}


CHANGES: dict[str, Callable[[Batch], Batch]] = {
    "padding": dict,
    "labels": _with_labels,
    "decoder": _with_decoder_mask,
    "both": lambda batch: _with_labels(_with_decoder_mask(batch)),
}
LOOPED = [(name, change) for name in FAMILIES for change in ("padding", "labels")]
LOOPED += [("switch_transformers", "decoder"), ("switch_transformers", "both")]


def _keeps(batch: Batch) -> dict[bool, list[bool]]:
    """Say of each token, by whether it is the encoder's, whether it counts."""
    mask = batch["attention_mask"].flatten().tolist()
    own = batch.get("decoder_attention_mask", torch.ones_like(batch["attention_mask"])).flatten().tolist()
    labels = batch.get("labels", torch.zeros_like(batch["attention_mask"])).flatten().tolist()
    decoder = own if "decoder_input_ids" in batch else mask
    kept = [bool(real) and label != -100 for real, label in zip(decoder, labels, strict=True)]
    return {True: [bool(real) for real in mask], False: kept}


@pytest.mark.parametrize(("name", "change"), LOOPED)
def test_statistics_equal_a_loop_over_the_tokens_that_count(name: str, change: str) -> None:
    model = build(name)
    data = [CHANGES[change](batch) for batch in batches(name, model)]
    statistics = collect_statistics(model, data, BASIC)
    seen = observe(model, FAMILIES[name], data)
    assert seen.keys() == statistics.layers.keys()
    for layer, tokens in seen.items():
        keep = [kept for batch in data for kept in _keeps(batch)["encoder" in layer]]
        expected, found = sums(tokens, keep), statistics[layer]
        assert 0 < expected.tokens < len(tokens) or change == "decoder" or "decoder" in layer
        if FAMILIES[name].capacity is not None:
            assert sum(keep) > expected.tokens, "or no token that counts is over capacity"
        assert found.tokens == expected.tokens
        assert found.counts.tolist() == expected.counts
        assert found["gate_sum"].tolist() == pytest.approx(expected.gates, rel=1e-5)
        gram = torch.tensor(expected.gram, dtype=torch.float64)
        torch.testing.assert_close(found["logit_gram"], gram, rtol=1e-5, atol=1e-5 * float(gram.abs().max()))


@pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)
def test_every_family_counts_each_real_token_once_and_is_left_as_it_was(family: Family) -> None:
    model = build(family.name)
    batch, before = inputs(family.name, model), state(model)
    statistics = collect_statistics(model, [batch], BASIC)
    assert state(model) == before
    for layer in moe_layers(model):
        found = statistics[layer.name]
        tokens = 24 if "decoder_input_ids" in batch and "encoder" not in layer.name else 21
        if family.name == "switch_transformers":  # tokens over capacity count nowhere
            assert found.tokens == found.counts.sum() <= tokens
        else:
            assert found.tokens == tokens
        assert layer.top_k is not None
        assert found.counts.sum() <= layer.top_k * tokens
        assert found.counts.sum() == layer.top_k * tokens or family.name in FEWER_PICKS
        assert found["gate_sum"].sum() > 0
        assert found["logit_gram"].diagonal().min() > 0
        torch.testing.assert_close(found["logit_gram"], found["logit_gram"].T)


@pytest.mark.parametrize("name", FAMILIES)
def test_split_batches_add_up_to_the_whole(name: str) -> None:
    model = build(name)
    whole = batches(name, model, number=1, batch_size=7)[0]
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(3), slice(3, 6), slice(6, 7))]
    statistics = collect_statistics(model, [whole])
    _assert_close(collect_statistics(model, iter(parts)), statistics)
    _assert_close(collect_statistics(model, parts[:1]) + collect_statistics(model, parts[1:]), statistics)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_counts_as_the_unpadded_one(name: str) -> None:
    model = build(name)
    batch = {key: value[-1:] for key, value in inputs(name, model).items()}
    plain = _cut(batch, 9)
    if "decoder_input_ids" in batch:
        batch |= {"decoder_attention_mask": batch["attention_mask"]}
    _assert_close(collect_statistics(model, [batch]), collect_statistics(model, [plain]))


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral"])
def test_router_noise_and_dropout_are_off(name: str) -> None:
    model = build(name)
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.5
    evaluated = _collect(name, model)
    model.train()
    assert observe(model, FAMILIES[name], batches(name, model, 1)) != observe(
        model, FAMILIES[name], batches(name, model, 1)
    ), "the noise must be on for this test to mean anything"
    _assert_equal(_collect(name, model), evaluated)
    _assert_equal(_collect(name, model), evaluated)


def _failing(name: str, model: PreTrainedModel) -> Iterator[Batch]:
    good = inputs(name, model)
    yield good
    yield {**good, "input_ids": good["input_ids"].float()}


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "jetmoe", "dbrx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was_also_when_a_forward_raises(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype).train()
    next(iter(model.children())).eval()
    layer = moe_layers(model)[0]
    layer.router.register_forward_hook(lambda module, arguments, output: None)
    before = state(model)
    collect_statistics(model, [inputs(name, model)])
    assert state(model) == before
    with pytest.raises(RuntimeError, match="scalar type"):
        collect_statistics(model, _failing(name, model))
    assert state(model) == before


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral"])
def test_a_router_that_gives_nan_is_refused(name: str) -> None:
    model = build(name)
    layer = moe_layers(model)[-1]
    block = layer.name.rpartition(".")[0].replace(".", r"\.")
    with torch.no_grad():
        next(layer.router.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match=rf"The weight {block}\.\S+ is nan at \["):
        _collect(name, model)


def test_bad_requests_are_refused_before_the_first_forward() -> None:
    model = build("mixtral")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match="calibration set is empty"):
        collect_statistics(model, [])
    with pytest.raises(ValueError, match=r"Unknown statistic 'count'\. Did you mean 'counts'\?"):
        collect_statistics(model, batches("mixtral", model), ["logit_gram", "count"])


def test_statistics_of_some_layers_say_which_are_missing_and_those_of_none_are_refused() -> None:
    model = build("mixtral")
    first, *others = moe_layers(model).names
    statistics = collect_statistics(moe_layers(model)[1:], batches("mixtral", model, 1))
    message = f"no statistics of the layer '{first}', only of {', '.join(others)}: "
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_merge(model, statistics)
    with pytest.raises(ValueError, match="no layer to collect statistics of"):
        collect_statistics(moe_layers(model)[:0], batches("mixtral", model, 1))


def test_what_the_methods_need_is_collected_and_nothing_else() -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=1)
    usual = collect_statistics(moe_layers(model), data)
    assert all(sums.keys() == {"counts", "tokens", "logit_gram"} for sums in usual.layers.values())
    config = MergeConfig(saliency="gate", similarity="random")
    statistics = collect_statistics(model, data, config.needs)
    assert all(sums.keys() == {"gate_sum", "tokens"} for sums in statistics.layers.values())
    plan_merge(model, statistics, config)
    missing = r"'counts' was not collected \(there are: gate_sum, tokens\).*calibrate MODEL.*--methods counts"
    with pytest.raises(ValueError, match=missing):
        plan_merge(model, statistics, MergeConfig(similarity="random"))

    def mine(view: LayerView) -> torch.Tensor:
        return view.sums["gate_sum"]

    assert "gate_sum" not in MergeConfig(saliency=mine).needs
    mine.needs = ["gate_sum"]
    assert MergeConfig(saliency=mine).needs == ("gate_sum", "logit_gram", "tokens")


def test_gradients_of_experts_that_layers_share_count_once() -> None:
    model = build("mixtral")
    shared, other = (layer.container for layer in moe_layers(model)[:2])
    other.gate_up_proj, other.down_proj = shared.gate_up_proj, shared.down_proj
    batch, layers = batches("mixtral", model, 1)[0], moe_layers(model)
    assert [len(tied) for tied in layers.tied] == [2, 1, 1]
    statistics = collect_statistics(layers, [batch], ["taylor"])
    model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    for tied in layers.tied:
        weights = [parameter for _, parameter in tied[0].parameters]
        expected = sum((weight * weight.grad).detach().double().abs().sum((1, 2)) for weight in weights)
        together = statistics.together([layer.name for layer in tied])["taylor"]
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=0)


def test_sums_not_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(routed: Routed) -> torch.Tensor:
        pytest.fail("a sum that nobody asked for was computed")

    for name in set(STATISTICS) - {"counts", "tokens"}:
        monkeypatch.setitem(STATISTICS.methods, name, replace(STATISTICS.find(name), function=fail))
    model = build("mixtral")
    collect_statistics(model, batches("mixtral", model, 1), ["counts"])


def test_the_canvas_of_a_block_diffusion_model_is_masked_by_its_own_part_of_the_mask() -> None:
    model = build("diffusion_gemma")
    batch = inputs("diffusion_gemma", model)
    batch["decoder_attention_mask"] = torch.cat([batch["attention_mask"], batch["attention_mask"].flip(0)], 1)
    batch["decoder_attention_mask"][:, -1] = 0
    statistics = collect_statistics(model, [batch])
    for name, layer in statistics.layers.items():
        assert layer.tokens == (21 if "encoder" in name else 20)


def test_a_mask_of_another_shape_than_the_tokens_is_refused() -> None:
    model = build("mixtral")
    batch = inputs("mixtral", model)
    with pytest.raises(ValueError, match="saw 24 tokens, the batch's mask has 22"):
        collect_statistics(model, [{**batch, "labels": batch["input_ids"][:, :11], "attention_mask": None}])
    square = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \[batch, length\]"):
        collect_statistics(model, [{**batch, "attention_mask": square}])


def test_a_merged_model_is_refused() -> None:
    model = build("mixtral")
    merged = merge_experts(model, plan_merge(model, _collect("mixtral", model), MergeConfig(experts=2)))
    with pytest.raises(ValueError, match="is compressed already"):
        _collect("mixtral", merged)


def _router_outputs(model: PreTrainedModel, suffix: str, batch: Batch) -> dict[str, list[torch.Tensor]]:
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp." + suffix):
            layer = name.removesuffix(suffix) + "experts"
            module.register_forward_hook(
                lambda module, arguments, output, layer=layer: outputs.update({layer: output})
            )
    with torch.no_grad():
        model(**batch)
    return outputs


def test_tokens_that_zaya_lets_skip_all_experts_count_for_none() -> None:
    model = build("zaya")
    for module in model.modules():
        if hasattr(module, "balancing_biases"):
            module.balancing_biases.zero_()
    batch = inputs("zaya", model) | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    statistics = collect_statistics(model, [batch])
    skipped = 0
    for name, (scores, *_) in _router_outputs(model, "gate", batch).items():
        biases = model.get_submodule(name.removesuffix("experts") + "gate").balancing_biases
        picks = [int((row.softmax(0) + biases).argmax()) for row in scores]
        skipped += picks.count(8)
        assert statistics[name].counts.tolist() == [picks.count(expert) for expert in range(8)]
        assert statistics[name].tokens == 24
        torch.testing.assert_close(statistics[name]["logit_gram"], scores[:, :8].double().T @ scores[:, :8].double())
    assert 0 < skipped < 4 * 24


def test_identity_experts_of_longcat_flash_are_not_counted() -> None:
    model = build("longcat_flash")
    batch = inputs("longcat_flash", model) | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    statistics = collect_statistics(model, [batch])
    identical = 0
    for name, (scores, _, picks) in _router_outputs(model, "router", batch).items():
        flat = picks.flatten().tolist()
        identical += sum(pick >= 8 for pick in flat)
        assert statistics[name].counts.tolist() == [flat.count(expert) for expert in range(8)]
        torch.testing.assert_close(statistics[name]["logit_gram"], scores[:, :8].double().T @ scores[:, :8].double())
    assert identical > 0


def test_a_bfloat16_model_has_statistics_in_double_precision() -> None:
    model = build("mixtral").bfloat16()
    data = batches("mixtral", model)
    statistics = collect_statistics(model, data)
    keep = [kept for batch in data for kept in _keeps(batch)[False]]
    for name, tokens in observe(model, FAMILIES["mixtral"], data).items():
        found, gram = statistics[name], torch.tensor(sums(tokens, keep).gram, dtype=torch.float64)
        norms = gram.diagonal().sqrt()
        assert found["logit_gram"].dtype == torch.float64
        assert found.counts.sum() == 2 * found.tokens
        assert ((found["logit_gram"] - gram).abs() <= 2**-8 * norms[:, None] * norms).all(), (
            "the error of rounded logits"
        )


@pytest.mark.parametrize("name", ["switch_transformers", "mixtral", "zaya", "deepseek_v3"])
def test_the_fingerprint_knows_a_model_in_either_precision_from_another(name: str) -> None:
    model = build(name)
    statistics = _collect(name, model)
    half = copy.deepcopy(model).bfloat16()
    assert _collect(name, half).fingerprint == statistics.fingerprint
    assert plan_merge(half, statistics, MergeConfig(experts=2)).fingerprint == statistics.fingerprint
    other = build(name, seed=1)
    assert _collect(name, other).fingerprint != statistics.fingerprint
    with pytest.raises(ValueError, match="taken from another model"):
        plan_merge(other, statistics)


@pytest.mark.parametrize("place", OFFLOADED)
def test_offloaded_weights_give_the_same_statistics_and_stay_offloaded(place: str, tmp_path: Path) -> None:
    expected = _collect("mixtral", build("mixtral"))
    model = OFFLOADED[place](build("mixtral"), tmp_path)
    where = [parameter.device.type for parameter in model.parameters()]
    assert "meta" in where
    _assert_equal(_collect("mixtral", model), expected)
    assert [parameter.device.type for parameter in model.parameters()] == where


def test_the_fingerprint_tells_a_model_trained_further_with_frozen_routers() -> None:
    model = build("mixtral")
    statistics = collect_statistics(model, batches("mixtral", model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." not in name:
                parameter.mul_(1.02)
    with pytest.raises(ValueError, match="another model"):
        plan_merge(model, statistics, MergeConfig(experts=2))
