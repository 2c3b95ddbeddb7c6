"""Dense models as SMoEs with frozen random routers, and k that grows."""

import math
from pathlib import Path

import pytest
import torch
from families import build
from helpers import logits
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from variant_folders import dense, tokens

from hf_mcsmoe.variants import ElasticTopK, evaluate_k_sweep, get_top_k, moefy_dense, set_top_k

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "initializer_range": 0.2, "pad_token_id": 0}
GROUPED = {**HEADS, "num_key_value_heads": 2, "head_dim": 8}
DENSE = {
    "llama": dense,
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, **HEADS)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **HEADS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
}


def _built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = DENSE[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_all_experts_of_a_split_model_are_the_dense_model(name: str, num_experts: int) -> None:
    model = _built(name)
    batch = tokens(model)
    expected = logits(model, batch)
    moefy_dense(model, num_experts)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_fewer_experts_are_the_sum_of_those_picked_by_the_router_in_scale() -> None:
    model = moefy_dense(dense(), 4, top_k=3)
    block, hidden = model.model.layers[0].mlp, torch.randn(5, 32)
    scores = hidden @ block.gate.weight.T + block.gate.bias
    expected = torch.zeros(5, 32)
    for token in range(5):
        for expert in scores[token].topk(3).indices:
            gate, up = (block.experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            expected[token] += 4 / 3 * block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(block(hidden[None])[0], expected, atol=1e-4, rtol=1e-4)


def test_gates_of_the_paper_are_a_softmax_over_the_picked() -> None:
    block = moefy_dense(dense(), 4, top_k=2, gate_scale="softmax").model.layers[0].mlp
    values, weights, index = block.gate(torch.randn(6, 32))
    best = values.sort(descending=True).values[:, :2].exp()
    torch.testing.assert_close(weights, best / best.sum(-1, keepdim=True))
    assert torch.equal(values.gather(1, index), values.sort(descending=True).values[:, :2])


@pytest.mark.slow
def test_the_router_is_not_trained_and_k_grows_to_its_end(tmp_path: Path) -> None:
    model = moefy_dense(dense(), 8, top_k=2, seed=0)
    router = model.model.layers[0].mlp.gate
    before, experts = router.weight.clone(), model.model.layers[0].mlp.experts.down_proj.clone()
    rows = [{"input_ids": row, "labels": row} for row in tokens(model)["input_ids"]]
    arguments = TrainingArguments(tmp_path, max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(get_top_k(model)))
    Trainer(model, arguments, train_dataset=rows, callbacks=[ElasticTopK(2, 8)]).train()
    assert seen == [2, 4, 5, 6]
    assert torch.equal(router.weight, before)
    assert not router.weight.requires_grad
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, experts)


@pytest.mark.parametrize(
    ("schedule", "values"),
    {
        "linear": [2, 9, 16],
        "cosine": [2, 9, 16],
        "exponential": [2, 2 + round(14 * (1 - 0.99**150)), 2 + round(14 * (1 - 0.99**300))],
        "multistep": [2, 8, 16],
    }.items(),
)
def test_schedules_are_their_formulas(schedule: str, values: list[int]) -> None:
    growing = ElasticTopK(2, 16, schedule)
    assert [growing.k_at(step, 100) for step in (0, 50, 100)] == values
    steps = [growing.k_at(step, 100) for step in range(101)]
    assert steps == sorted(steps)
    assert ElasticTopK(2, 16, "cosine").k_at(25, 100) == 2 + round(7 * (1 - math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx"])
def test_any_model_gets_another_k_as_its_configuration_would_say(name: str, tmp_path: Path) -> None:
    model = build(name)
    batch = tokens(model)
    before, k = logits(model, batch), get_top_k(model)
    set_top_k(model, 2 if k == 1 else 1)
    changed, balance = logits(model, batch), model(**batch, output_router_logits=True).aux_loss
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), changed)
    assert torch.equal(loaded(**batch, output_router_logits=True).aux_loss, balance), "an old k in the head's loss"
    set_top_k(model, k)
    assert torch.equal(logits(model, batch), before)


def test_another_model_of_the_same_configuration_keeps_its_k() -> None:
    model = build("mixtral")
    other = type(model)(model.config)
    before = other.config.to_dict()
    set_top_k(model, 5)
    assert (other.config.to_dict(), get_top_k(other)) == (before, before["num_experts_per_tok"])
    assert model.config.num_experts_per_tok == model.model.config.num_experts_per_tok == 5


def test_growth_ends_at_its_largest_k() -> None:
    model = moefy_dense(dense(), 4, top_k=1)
    ElasticTopK(1, 4).on_train_end(None, None, None, model=model)
    assert (get_top_k(model), model.config.variant["options"]["top_k"]) == (4, 4)


def test_a_sweep_leaves_out_what_has_no_label_and_the_loss_of_load_balancing() -> None:
    model = build("mixtral")
    model.config.output_router_logits, model.router_aux_loss_coef = True, 100.0
    ids = tokens(model)["input_ids"]
    batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    losses = evaluate_k_sweep(model, batches, [2])
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert losses == {2: pytest.approx(expected.item(), abs=1e-5)}
    with pytest.raises(ValueError, match="labels that count"):
        evaluate_k_sweep(model, batches[1:], [2])


def test_a_sweep_of_a_classifier_weighs_batches_by_their_rows() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, **HEADS, num_labels=3)).eval()
    moefy_dense(model, 2)
    ids, labels = torch.randint(1, 128, (3, 7)), torch.tensor([0, 2, 1])
    batches = [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]
    expected = torch.nn.functional.cross_entropy(model(ids).logits, labels).item()
    assert evaluate_k_sweep(model, batches, [2]) == {2: pytest.approx(expected, abs=1e-5)}


def test_a_sweep_of_a_classifier_of_tokens_counts_the_first_of_a_row() -> None:
    torch.manual_seed(0)
    model = moefy_dense(LlamaForTokenClassification(LlamaConfig(**SIZES, **HEADS, num_labels=3)).eval(), 2)
    batches = []
    for rows, length in ((4, 2), (1, 7)):
        labels = torch.randint(0, 3, (rows, length))
        labels[0, -1] = -100
        batches.append({"input_ids": torch.randint(1, 128, (rows, length)), "labels": labels})
    losses = []
    for batch in batches:
        logits, labels = model(batch["input_ids"]).logits.log_softmax(-1), batch["labels"]
        losses += [-logits[b, s, labels[b, s]].item() for b, s in (labels != -100).nonzero().tolist()]
    assert len(losses) == 13
    assert evaluate_k_sweep(model, batches, [2]) == {2: pytest.approx(sum(losses) / len(losses), abs=1e-5)}


def test_a_sweep_tells_the_loss_of_each_k_and_leaves_the_model_alone() -> None:
    model = moefy_dense(dense(), 4, top_k=3, seed=0).train()
    batch = tokens(model)
    batches = [{**batch, "labels": batch["input_ids"]}, {"input_ids": batch["input_ids"][:1, :5]}]
    batches[1]["labels"] = batches[1]["input_ids"]
    losses = evaluate_k_sweep(model, batches, [1, 4])
    assert (get_top_k(model), model.training) == (3, True)
    for k, loss in losses.items():
        set_top_k(model.eval(), k)
        parts = [torch.nn.functional.cross_entropy(
            model(**item).logits[:, :-1].flatten(0, 1), item["labels"][:, 1:].flatten(), reduction="none"
        ) for item in batches]  # fmt: skip
        assert loss == pytest.approx(torch.cat(parts).mean().item(), abs=1e-5)


def test_a_reloaded_model_has_its_router_and_its_k(tmp_path: Path) -> None:
    model = moefy_dense(dense(), 4, top_k=2)
    set_top_k(model, 3)
    batch = tokens(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert get_top_k(loaded) == 3
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "a divisor": (lambda: moefy_dense(dense(), 7), "64 hidden units .* 7 experts: choose a divisor"),
        "k of N": (lambda: moefy_dense(dense(), 4, top_k=5), "top_k=5 and num_experts=4"),
        "gates": (lambda: moefy_dense(dense(), 4, gate_scale="sum"), "exact, softmax, not 'sum'"),
        "layout": (lambda: moefy_dense(_t5(), 4), "has no MLP of the layouts"),
        "twice": (lambda: moefy_dense(moefy_dense(dense(), 4), 4), "neither of a compressed one nor of another"),
        "too many": (lambda: set_top_k(build("mixtral"), 9), "from 1 to 8, .* not 9"),
        "of its experts": (lambda: set_top_k(build("dbrx"), 10_000), "from 1 to 8, .* not 10000"),
        "groups": (lambda: set_top_k(build("deepseek_v3"), 8), "from 1 to 4, .* not 8"),
        "half": (lambda: set_top_k(build("mixtral"), 1.5), "top_k must be a whole number, 1 or more, not 1.5"),
        "nan": (lambda: moefy_dense(dense(), math.nan), "top_k=nan and num_experts=nan"),
        "endless": (lambda: ElasticTopK(1, math.inf), "k_max must be a whole number, 1 or more, not inf"),
        "no steps": (lambda: ElasticTopK(1, 2).k_at(0, 0), "of 1 or more, not step 0 of 0"),
        "no step": (lambda: ElasticTopK(1, 2).k_at(math.nan, 9), "not step nan of 9"),
        "no k": (lambda: set_top_k(build("switch_transformers"), 1), "no blocks whose number"),
        "shrinking": (lambda: ElasticTopK(4, 2), "k_min=4 and k_max=2"),
        "schedule": (lambda: ElasticTopK(1, 2, "step"), "multistep, not 'step'"),
        "labels": (lambda: evaluate_k_sweep(moefy_dense(dense(), 2), [{}], [1]), "batches with labels"),
    }.values(),
)  # fmt: skip
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_mlp_that_computes_something_else_is_refused_and_the_model_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = dense()
    mlp = type(model.model.layers[1].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x) + x)
    with pytest.raises(ValueError, match="LlamaMLP computes something else"):
        moefy_dense(model, 4)
    assert type(model.model.layers[0].mlp) is mlp


def test_where_a_later_mlp_computes_something_else_no_earlier_one_is_changed() -> None:
    model = dense()
    layers = model.model.layers
    cls, forward = type(layers[0].mlp), layers[1].mlp.forward
    layers[1].mlp.forward = lambda x: forward(x) + x
    with pytest.raises(ValueError, match="LlamaMLP computes something else"):
        moefy_dense(model, 4)
    assert [type(layer.mlp) for layer in layers] == [cls, cls]
