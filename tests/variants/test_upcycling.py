"""Dense models as the experts of a mixture: equal ones are it, and a router that chooses one is that one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import logits
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from variant_folders import dense, tokens

from hf_mcsmoe.variants import upcycle_dense

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
GIVEN = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
BRANCHES: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("mixtral", lambda: dense(torch.initial_seed())),
    "mistral": ("mixtral", lambda: MistralForCausalLM(MistralConfig(**GIVEN, head_dim=16, sliding_window=5))),
    "qwen3": ("qwen3_moe", lambda: Qwen3ForCausalLM(Qwen3Config(**GIVEN, head_dim=16, tie_word_embeddings=True))),
    "olmo2": ("flex_olmo", lambda: Olmo2ForCausalLM(Olmo2Config(**GIVEN))),
    "olmoe": ("olmoe", lambda: OlmoeForCausalLM(OlmoeConfig(**GIVEN, num_experts=1, num_experts_per_tok=1))),
}


def _branch(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = BRANCHES[name][1]().eval()
    model.config.norm_topk_prob = True  # an OLMoE of one expert is dense only then
    for module in model.modules():
        if "norm_topk_prob" in vars(module):
            module.norm_topk_prob = True
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1, 0.1)
    return model


@pytest.mark.parametrize("name", BRANCHES)
def test_equal_models_are_their_mixture_whatever_the_routers_say(name: str, tmp_path: Path) -> None:
    model = _branch(name)
    batch = tokens(model)
    mixture = upcycle_dense([model] * 4, BRANCHES[name][0], router_std=1.0)
    torch.testing.assert_close(logits(mixture, batch), logits(model, batch), atol=1e-4, rtol=1e-4)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.models.")
    torch.testing.assert_close(logits(loaded, batch), logits(mixture, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_router_that_chooses_one_model_has_its_mlp_and_all_else_is_the_mean(name: str) -> None:
    models = [_branch(name, seed) for seed in range(3)]
    with pytest.warns(UserWarning, match="gives the routers no gradient"):
        mixture = upcycle_dense(models, BRANCHES[name][0], top_k=1)
    mixture(**tokens(mixture)).logits.logsumexp(-1).sum().backward()
    assert mixture.model.layers[1].mlp.gate.weight.grad.abs().max() < 1e-5
    states = [model.state_dict() for model in models]
    for key, value in mixture.state_dict().items():
        if ".mlp." not in key:
            torch.testing.assert_close(value, sum(state[key] for state in states) / 3)
    hidden, block = torch.randn(1, 5, 32), mixture.model.layers[1].mlp
    for chosen, model in enumerate(models):
        torch.nn.init.zeros_(block.gate.weight)
        block.gate.weight.data[chosen] = 100 * hidden.mean((0, 1))
        used = (block.gate.weight @ hidden[0].T).argmax(0) == chosen
        found, expected = block(hidden), model.model.layers[1].mlp(hidden)
        torch.testing.assert_close(found[0, used], expected[0, used], atol=1e-5, rtol=1e-5)
        assert used.any()


@pytest.mark.parametrize(
    ("models", "into", "options", "message"),
    {
        "family": (["llama"], "gpt_oss", {"top_k": 1}, "flex_olmo, not 'gpt_oss'"),
        "branch": (["qwen3", "qwen3"], "mixtral", {}, "of llama or mistral, not of qwen3"),
        "mixed": (["llama", "mistral"], "mixtral", {}, "branches must be of one ancestor"),
        "few": (["llama"], "mixtral", {}, "top_k=2 and 1 models"),
        "none": ([], "mixtral", {}, "top_k=2 and 0 models"),
        "half": (["llama", "llama"], "mixtral", {"top_k": 1.5}, "top_k must be a whole number, 1 or more, not 1.5"),
    }.values(),
)
def test_bad_input_is_refused(models: list[str], into: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle_dense([_branch(name) for name in models], into, **options)


def test_biases_that_the_family_has_no_place_for_are_told() -> None:
    models = [dense(mlp_bias=True) for _ in range(2)]
    with pytest.raises(ValueError, match=r"mixtral has no place for \['model.layers.0.mlp.*bias'\]"):
        upcycle_dense(models, "mixtral")


def test_layers_of_two_kinds_of_attention_are_refused() -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**GIVEN, head_dim=16, **window))
    assert len(set(model.config.layer_types)) == 2
    with pytest.raises(ValueError, match="full_attention and sliding_attention, and qwen3_moe has one kind"):
        upcycle_dense([model] * 2, "qwen3_moe")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT
def test_models_without_a_head_with_adapters_or_without_weights_are_refused() -> None:
    model = dense()
    with pytest.raises(ValueError, match="Model 1, LlamaModel, has no head for causal"):
        upcycle_dense([model, model.model], "mixtral")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match="load it without device_map"):
        upcycle_dense([model, empty], "mixtral")
    adapted = get_peft_model(dense(), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for given, name in ((adapted, "PeftModelForCausalLM"), (adapted.get_base_model(), "LlamaForCausalLM")):
        with pytest.raises(ValueError, match=f"Model 0, {name}, .* merge_and_unload"):
            upcycle_dense([given, model], "mixtral")


@pytest.mark.parametrize("attention", ["mixture", "shared_kv"])
@pytest.mark.parametrize("name", BRANCHES)
def test_equal_models_are_their_mixture_of_attention_too(name: str, attention: str, tmp_path: Path) -> None:
    model = _branch(name)
    batch = tokens(model)
    mixture = upcycle_dense([model] * 3, BRANCHES[name][0], router_std=1.0, attention=attention)
    torch.testing.assert_close(logits(mixture, batch), logits(model, batch), atol=1e-4, rtol=1e-4)
    mixture.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(mixture, batch))


@pytest.mark.parametrize("name", BRANCHES)
def test_mixed_attention_is_the_weighed_sum_of_the_models_attention(name: str) -> None:
    models = [_branch(name, seed) for seed in range(3)]
    mixture = upcycle_dense(models, BRANCHES[name][0], router_std=1.0, attention="mixture")
    parts = [model.model.layers[1].self_attn for model in models]
    mixed, hidden = mixture.model.layers[1].self_attn, torch.randn(2, 5, 32)
    places = mixture.model.rotary_emb(hidden, torch.arange(5)[None])
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    for part in (mixed, *parts):
        part.config._attn_implementation = "eager"
    with torch.no_grad():
        outputs = [part(hidden_states=hidden, position_embeddings=places, attention_mask=mask)[0] for part in parts]
        shares = (hidden @ mixed.router.weight.T).softmax(-1)
        expected = sum(shares[..., i, None] * output for i, output in enumerate(outputs))
        found = mixed(hidden_states=hidden, position_embeddings=places, attention_mask=mask)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        for chosen, output in enumerate(outputs):
            hook = mixed.router.register_forward_hook(
                lambda _, __, out, chosen=chosen: torch.where(torch.arange(3) == chosen, 1e4, torch.zeros_like(out))
            )
            found = mixed(hidden_states=hidden, position_embeddings=places, attention_mask=mask)[0]
            torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)
            hook.remove()


@pytest.mark.parametrize("attention", ["mixture", "shared_kv"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_mixed_attention_generates_with_a_cache_as_without(name: str, attention: str) -> None:
    models = [_branch(name, seed) for seed in range(3)]
    mixture = upcycle_dense(models, BRANCHES[name][0], router_std=1.0, attention=attention)
    ids = torch.randint(50, 120, (2, 7))
    options = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    cached, whole = (mixture.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.logits, whole.logits, atol=1e-4, rtol=1e-4)
    assert cached.past_key_values.layers[0].keys.shape[1] == (2 if attention == "shared_kv" else 2 * 3)


def test_attention_of_another_name_or_with_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="average, mixture, shared_kv, not 'moa'"):
        upcycle_dense([_branch("llama")] * 2, "mixtral", attention="moa")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**GIVEN, head_dim=16, attention_bias=True))
    with pytest.raises(ValueError, match="Attention with biases is averaged alone"):
        upcycle_dense([model] * 2, "qwen3_moe", attention="mixture")
