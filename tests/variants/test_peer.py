"""Single neurons retrieved by product keys, against loops over all of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from variant_folders import dense, tokens

from hf_mcsmoe.variants import PEERLayer, swap_peer
from hf_mcsmoe.variants.peer_mcsmoe import feed_forwards, product_key_top_k

WIDTH, SIDE = 12, 6
SMALL: dict[str, Any] = {"num_experts": SIDE**2, "heads": 3, "top_k": 4, "key_size": 8}


def _layer(**given: Any) -> PEERLayer:
    torch.manual_seed(0)
    layer = PEERLayer(WIDTH, **SMALL | given)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.eval()


def _scores(layer: PEERLayer, queries: torch.Tensor) -> torch.Tensor:
    """Return the scores of all experts, [T, h, N], for queries [T, h, d], one by one."""
    half, side = queries.shape[-1] // 2, layer.keys.shape[1]
    found = queries.new_empty(*queries.shape[:2], side**2)
    for number in range(side**2):
        key = torch.cat([layer.keys[0, number // side], layer.keys[1, number % side]])
        assert len(key) == 2 * half
        found[..., number] = queries @ key
    return found


@pytest.mark.parametrize(("side", "k"), [(6, 1), (6, 4), (6, 6), (1, 1), (17, 9)])
def test_product_keys_find_the_best_of_all(side: int, k: int) -> None:
    layer = _layer(num_experts=side**2, top_k=k)
    queries = torch.randn(50, 3, 8)
    scores, index = product_key_top_k(queries, layer.keys, k)
    everything = _scores(layer, queries).detach()
    expected, expected_index = everything.topk(k, dim=-1)
    torch.testing.assert_close(scores.detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(everything.gather(-1, index), scores.detach(), atol=1e-5, rtol=1e-5)
    assert (index == expected_index).float().mean() > 0.99, "but for ties within rounding"


def test_equal_scores_are_each_picked_once() -> None:
    _, index = product_key_top_k(torch.zeros(2, 8), torch.randn(2, 6, 4), 6)
    assert [len(set(row)) for row in index.tolist()] == [6, 6]


@pytest.mark.parametrize("query_batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_output_is_the_weighted_sum_of_the_neurons_that_each_head_retrieves(
    activation: str, query_batch_norm: bool
) -> None:
    layer, tokens = _layer(activation=activation, query_batch_norm=query_batch_norm), torch.randn(2, 5, WIDTH)
    queries = tokens.flatten(0, 1) @ layer.query.weight.T
    if query_batch_norm:
        layer.query_norm.running_mean.normal_()
        layer.query_norm.running_var.uniform_(0.5, 2)
        norm = layer.query_norm
        queries = (queries - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    everything, act_fn = _scores(layer, queries.view(10, 3, 8)), getattr(torch.nn.functional, activation)
    expected = torch.zeros(10, WIDTH)
    for token, x in enumerate(tokens.flatten(0, 1)):
        for scores in everything[token]:
            best = scores.sort(descending=True).indices[:4]
            total = sum(scores[expert].exp() for expert in best)
            for expert in best:
                gate = scores[expert].exp() / total
                inner = act_fn(layer.experts.up_proj[expert] @ x)
                expected[token] += gate * inner * layer.experts.down_proj[expert]
    torch.testing.assert_close(layer(tokens).flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


def test_one_neuron_a_head_is_an_mlp_of_as_many_neurons() -> None:
    layer, tokens = _layer(top_k=1, heads=5), torch.randn(7, WIDTH)
    _, index = layer.retrieve(tokens)
    for x, picked, output in zip(tokens, index[..., 0], layer(tokens), strict=True):
        up, down = layer.experts.up_proj[picked], layer.experts.down_proj[picked].T
        assert up.shape == (5, WIDTH)
        torch.testing.assert_close(output, down @ torch.nn.functional.gelu(up @ x), atol=1e-4, rtol=1e-4)


def test_queries_are_normalised_over_a_batch_in_training_and_by_running_statistics_after() -> None:
    layer, tokens = _layer().train(), 3 + 2 * torch.randn(40, WIDTH)
    torch.nn.init.ones_(layer.query_norm.weight), torch.nn.init.zeros_(layer.query_norm.bias)
    seen: list[torch.Tensor] = []
    layer.query_norm.register_forward_hook(lambda _, args, output: seen.append(output))
    layer(tokens)
    queries = (tokens @ layer.query.weight.T).detach()
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0].var(0, unbiased=False), torch.ones(24), atol=1e-3, rtol=0)
    torch.testing.assert_close(layer.query_norm.running_mean, 0.1 * queries.mean(0), atol=1e-4, rtol=1e-4)
    before = copy.deepcopy(layer.eval().state_dict())
    whole = layer(tokens)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in tokens]), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.state_dict(), before, atol=0, rtol=0)


def test_padding_counts_in_training_and_not_after() -> None:
    model = swap_peer(dense(), **SMALL)
    ids = torch.randint(1, 128, (1, 9))
    longer = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    padded = {"input_ids": longer, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    torch.testing.assert_close(model(**padded).logits[:, 4:], model(ids).logits, atol=1e-4, rtol=1e-4)
    model.train()
    assert not torch.allclose(model(**padded).logits[:, 4:], model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("query_batch_norm", [True, False])
def test_gradients_reach_keys_queries_and_the_experts_picked(query_batch_norm: bool) -> None:
    layer, tokens = _layer(query_batch_norm=query_batch_norm).double().train(), torch.randn(4, WIDTH).double()
    _, index = layer.retrieve(tokens)
    layer(tokens).square().sum().backward()
    assert all(parameter.grad.any() for parameter in (layer.keys, layer.query.weight))
    for weight in layer.experts.parameters():
        assert set(weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) == set(index.flatten().tolist())
    for parameter in layer.parameters():
        place = int(parameter.grad.abs().argmax())
        changed = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.view(-1)[place] += step
                changed.append(layer(tokens).square().sum().item())
                parameter.view(-1)[place] -= step
        slope = (changed[0] - changed[1]) / 2e-6
        assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(("layer", "place"), [(None, 1), (0, 0), (-3, 0), (2, 2)])
def test_one_mlp_is_swapped(layer: int | None, place: int) -> None:
    model = swap_peer(dense(num_hidden_layers=3), layer, **SMALL)
    assert [isinstance(each.mlp, PEERLayer) for each in model.model.layers] == [number == place for number in range(3)]


@pytest.mark.parametrize("query_batch_norm", [True, False])
def test_a_block_of_experts_is_swapped_and_saved(query_batch_norm: bool, tmp_path: Path) -> None:
    model = swap_peer(build("mixtral"), 0, **SMALL, query_batch_norm=query_batch_norm)
    first, *others = (layer.mlp for layer in model.model.layers)
    assert isinstance(first, PEERLayer)
    assert all(isinstance(block, MixtralSparseMoeBlock) for block in others)
    batch = tokens(model)
    model.train()(**batch)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert len(loaded(**batch, output_router_logits=True).router_logits) == len(others)


def test_layers_of_both_kinds_are_counted_in_their_order() -> None:
    model = build("deepseek_v3")
    paths = [path for path, _ in feed_forwards(model)]
    assert paths == [f"model.layers.{number}.mlp" for number in range(len(model.model.layers))]
    assert {type(model.get_submodule(path)).__name__ for path in paths} >= {"DeepseekV3MoE"}


def test_a_layer_of_gpt2_is_swapped() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)).eval()
    model = swap_peer(model, **SMALL)
    assert model.transformer.h[1].mlp.experts.up_proj.shape == (SIDE**2, 32)
    assert logits(model, tokens(model)).isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_adapters_are_trained_with_is_saved_with_them(tmp_path: Path) -> None:
    base = swap_peer(dense(), **SMALL)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["query_norm"])
    model, batch = get_peft_model(copy.deepcopy(base), config), tokens(base)
    model.train()(**batch)
    expected = logits(model.eval(), batch)
    assert not torch.allclose(expected, logits(base, batch), atol=1e-3), "running statistics were to change"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), batch), expected)


def _recording(num_layers: int) -> MixtralForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_hidden_layers=num_layers, output_router_logits=True)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_only_block_of_experts_leaves_no_loss_of_routers(is_loaded: bool, tmp_path: Path) -> None:
    model, ids = swap_peer(_recording(1), **SMALL), torch.randint(3, 64, (2, 9))
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = model(input_ids=ids, labels=ids, output_router_logits=False)
    for asked in ({}, {"output_router_logits": True}):
        found = model(input_ids=ids, labels=ids, **asked)
        assert torch.equal(found.loss, plain.loss)
        assert found.aux_loss is None


def test_a_block_of_experts_that_is_left_keeps_its_loss() -> None:
    model, ids = swap_peer(_recording(2), 0, **SMALL), torch.randint(3, 64, (2, 9))
    found = model(input_ids=ids, labels=ids)
    assert [item.shape for item in found.router_logits] == [(18, 8)]
    plain = model(input_ids=ids, labels=ids, output_router_logits=False)
    assert found.aux_loss > 0
    torch.testing.assert_close(found.loss, plain.loss + model.config.router_aux_loss_coef * found.aux_loss)


def _tuple() -> PreTrainedModel:
    model = build("mixtral")
    model.model.layers[0].mlp.forward = lambda hidden_states: (hidden_states, None)
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "square": (lambda: swap_peer(dense(), **SMALL | {"num_experts": 35}), "must be a square, .* not 35"),
    "negative": (lambda: swap_peer(dense(), **SMALL | {"num_experts": -4}), "must be a square, .* not -4"),
    "k": (lambda: swap_peer(dense(), **SMALL | {"top_k": 7}), "from 1 to 6, the root of 36 .* top_k=7"),
    "no k": (lambda: PEERLayer(WIDTH, **SMALL | {"top_k": 0}), "top_k=0"),
    "heads": (lambda: PEERLayer(WIDTH, **SMALL | {"heads": 0}), "heads=0"),
    "halves": (lambda: PEERLayer(WIDTH, **SMALL | {"key_size": 7}), "cut into halves, not 7"),
    "nan": (lambda: PEERLayer(WIDTH, **SMALL | {"num_experts": float("nan")}), "must be a square, .* not nan"),
    "no number of heads": (
        lambda: PEERLayer(WIDTH, **SMALL | {"heads": float("inf")}),
        "heads must be a whole number",
    ),
    "half a k": (
        lambda: PEERLayer(WIDTH, **SMALL | {"top_k": 1.5}),
        "top_k must be a whole number, 1 or more, not 1.5",
    ),
    "activation": (lambda: swap_peer(dense(), **SMALL, activation="none"), "no activation 'none'"),
    "layer": (lambda: swap_peer(dense(), 2, **SMALL), "from -2 to 1, .* not 2"),
    "layout": (lambda: swap_peer(_bert(), **SMALL), "has no block of experts"),
    "tuple": (lambda: swap_peer(_tuple(), 0, **SMALL), "does not return hidden states alone"),
    "twice": (lambda: swap_peer(swap_peer(dense(), **SMALL), **SMALL), "neither of a compressed one nor of another"),
}


def _bert() -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_is_left_alone_where_a_number_is_refused() -> None:
    model = dense()
    before = type(model), model.config.to_dict(), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="top_k=7"):
        swap_peer(model, **SMALL | {"top_k": 7})
    assert (type(model), model.config.to_dict(), [name for name, _ in model.named_modules()]) == before
