"""Momentum across depth: exact where it changes nothing, by hand where it does, and kept nowhere between forwards."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import logits
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from variant_folders import dense, tokens
from without_package import recorded

from hf_mcsmoe.variants import MomentumWarmup, add_momentum, robust_constants, set_momentum

# A block that returns a tensor, one that returns a tuple, dense layers before experts, two stacks of every second.
SLOWER = ["qwen3_moe", "gpt_oss", "switch_transformers"]
FAMILIES = ["mixtral", "deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_share_nothing_changes_and_with_one_all_later_blocks_do(name: str) -> None:
    model = build(name)
    batch = tokens(model)
    expected = logits(model, batch)
    shapes = recorded(copy.deepcopy(model), batch)
    add_momentum(model, mu=0.0)
    assert torch.equal(logits(model, batch), expected)
    set_momentum(model, mu=0.5)
    changed = logits(model, batch)
    assert not torch.allclose(changed, expected, atol=1e-3)
    assert torch.equal(logits(model, batch), changed), "something is left of the forward before"
    assert torch.equal(logits(copy.deepcopy(model), batch), changed)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), changed)
    assert recorded(model, batch) == shapes


def _by_hand(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str, mu: float, gamma: float) -> Any:
    """Compute a Mixtral with outputs of experts replaced from outside: sums over the raw outputs kept in a list."""
    raw: list[torch.Tensor] = []

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        raw.append(output)
        last = len(raw) - 1
        if kind == "adam" and not last:
            return 0.3 * 0.1 * output / (0.001 * output**2 + 1e-8) ** 0.5
        if kind == "scale":
            return output * gamma * (1 - mu ** len(raw)) / (1 - mu)
        return gamma * sum(mu ** (last - layer) * step for layer, step in enumerate(raw))

    hooks = [layer.mlp.register_forward_hook(replace) for layer in model.model.layers]
    expected = logits(model, batch)
    for hook in hooks:
        hook.remove()
    return expected


@pytest.mark.parametrize("kind", ["momentum", "adam", "scale"])
def test_blocks_return_what_the_formulas_say(kind: str) -> None:
    model = build("mixtral")
    batch = tokens(model)
    expected = _by_hand(model, batch, kind, 0.6, 0.8)
    found = logits(add_momentum(model, 0.6, 0.8, kind=kind, adam_gamma=0.3), batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_hidden_states_without_names_have_no_momentum_beside_them() -> None:
    model = add_momentum(build("mixtral"), 0.5)
    batch = tokens(model)
    named = model(**batch, output_hidden_states=True, return_dict=True).hidden_states
    for part in (model, model.model):
        given = part(**batch, output_hidden_states=True, return_dict=False)
        states = [item for item in given if isinstance(item, tuple) and item[0].shape[-1] == 32]
        assert [[tuple(state.shape) for state in item] for item in states] == [[(2, 12, 32)] * 5]
        torch.testing.assert_close(states[0], named)


@pytest.mark.parametrize("name", ["llama4_text", "deepseek_v4", "ernie4_5_vl_moe", "qwen3_vl_moe"])
def test_families_whose_layers_hand_on_other_shapes_are_refused_at_once(name: str) -> None:
    model = build(name)
    cls = type(model)
    with pytest.raises(ValueError, match=f"Layers of {name}.* add_momentum does not serve this family"):
        add_momentum(model)
    assert type(model) is cls


def test_a_block_that_returns_rows_of_tokens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    block = type(model.model.layers[0].mlp)
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, hidden_states: forward(self, hidden_states).flatten(0, 1))
    add_momentum(model)
    with pytest.raises(ValueError, match=r"takes \[2, 12, 32\] and returns \[24, 32\]"):
        logits(model, tokens(model))


def test_the_look_ahead_of_robust_momentum_moves_the_experts_input() -> None:
    model = build("mixtral")
    batch, blocks = tokens(model), [layer.mlp for layer in model.model.layers]
    add_momentum(model, 0.5, look_ahead=0.3)
    inputs, outputs = [], []
    hooks = [block.gate.register_forward_hook(lambda _, args, __: inputs.append(args[0])) for block in blocks]
    hooks += [block.register_forward_hook(lambda _, args, out: outputs.append((args[0], out))) for block in blocks]
    logits(model, batch)
    for index in (1, 2):
        expected = outputs[index][0] + 0.3 * outputs[index - 1][1]
        torch.testing.assert_close(inputs[index], expected.flatten(0, 1))
    for hook in hooks:
        hook.remove()


def test_robust_constants_find_the_minimum_of_a_quadratic_at_their_rate() -> None:
    rho, smoothness, curvature = 0.75, 10.0, 1.0
    constants = robust_constants(rho, smoothness, curvature)
    hessian = torch.tensor([curvature, 4.0, smoothness], dtype=torch.float64)
    before = point = torch.ones(3, dtype=torch.float64)
    norms = []
    for _ in range(100):
        moved = point - before
        gradient = hessian * (point + constants["look_ahead"] * moved)
        before, point = point, point + constants["mu"] * moved - constants["gamma"] * gradient
        norms.append(float(point.norm()))
    assert (norms[-1] / norms[39]) ** (1 / 60) == pytest.approx(rho, abs=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_gradients_through_checkpoints_are_the_same(name: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = add_momentum(build(name), 0.7, look_ahead=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        batch = tokens(model)
        model(**batch).logits.logsumexp(-1).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        copy.deepcopy(model)  # which a tensor left over would not let be
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_generation_with_a_cache_is_that_without_one() -> None:
    model = add_momentum(build("qwen3_moe"), 0.7)
    ids = tokens(model)["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.logits, whole.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_warmed_model_is_trained_and_reloaded_with_its_numbers(tmp_path: Path) -> None:
    model = add_momentum(build("mixtral"), 0.0)
    rows = [{"input_ids": row, "labels": row} for row in tokens(model)["input_ids"]]
    arguments = TrainingArguments(tmp_path / "run", max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True)
    seen: list[float] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config.variant["options"]["mu"]))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[MomentumWarmup(0.6, steps=2)])
    trainer.train()
    assert seen == [0.0, 0.3, 0.6]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(loaded, tokens(model)), logits(model.eval(), tokens(model)))
    assert loaded.config.variant["options"]["mu"] == 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "mu": (lambda: add_momentum(build("mixtral"), 1.0), "from 0 below 1, not 1.0"),
        "gamma": (lambda: add_momentum(build("mixtral"), gamma=float("nan")), "must be from -1e.09 to 1e.09, not nan"),
        "large": (lambda: add_momentum(build("mixtral"), look_ahead=1e200), "to 1e.09, not 1.0, 1e.200"),
        "infinite": (lambda: add_momentum(build("mixtral"), adam_gamma=-float("inf")), "and -inf"),
        "mu nan": (lambda: add_momentum(build("mixtral"), float("nan")), "from 0 below 1, not nan"),
        "no steps": (lambda: MomentumWarmup(steps=0), "steps must be a whole number, 1 or more, not 0"),
        "endless": (lambda: MomentumWarmup(steps=float("inf")), "steps must be a whole number, 1 or more, not inf"),
        "robust": (lambda: robust_constants(0.9, 1.0, 5e-324), "needs 0 < curvature < smoothness"),
        "kind": (lambda: add_momentum(build("mixtral"), kind="nesterov"), "scale, not 'nesterov'"),
        "dense": (lambda: add_momentum(dense()), "no layers with a block of experts"),
        "none": (lambda: set_momentum(build("mixtral"), mu=0.1), "call add_momentum first"),
        "rate": (lambda: robust_constants(0.5, 10.0, 1.0), "rho=0.5"),
        "steps": (lambda: MomentumWarmup(0.5, 0), "1 or more, not 0"),
    }.values(),
)  # fmt: skip
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
