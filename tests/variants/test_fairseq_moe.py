"""Models of fairseq converted: checkpoints of its layout are made here, and computed here with plain tensors."""

import math
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import logits
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hf_mcsmoe import MergeConfig, collect_statistics, compress, moe_layers
from hf_mcsmoe.variants import convert_fairseq_moe, get_top_k, set_top_k

VOCAB, D, F, HEADS, LAYERS, EXPERTS, RANKS = 40, 16, 24, 2, 4, 6, 3
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_accurate": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def options(**changed: Any) -> dict[str, Any]:
    """Return the options that fairseq saves, those that the forward depends on and some others."""
    return {
        "arch": "transformer_lm_gpt", "decoder_layers": LAYERS, "decoder_attention_heads": HEADS, "dropout": 0.1,
        "decoder_embed_dim": D, "decoder_ffn_embed_dim": F, "activation_fn": "gelu", "no_scale_embedding": False,
        "decoder_normalize_before": True, "moe_freq": 2, "moe_expert_count": EXPERTS, "moe_top1_expert": False,
        "moe_second_expert_policy": "all", "tokens_per_sample": 32, "share_decoder_input_output_embed": True,
    } | changed  # fmt: skip


def weights(learned: bool = False) -> dict[str, torch.Tensor]:
    """Return all weights by fairseq's names, experts numbered over all files."""
    generator = torch.Generator().manual_seed(0)
    linear = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D)}
    linear["self_attn.out_proj"] = (D, D)
    shapes: dict[str, tuple[int, ...]] = {"decoder.embed_tokens.weight": (VOCAB, D)}
    if learned:
        shapes["decoder.embed_positions.weight"] = (34, D)
    for layer in range(LAYERS):
        parts = dict(linear)
        if layer % 2:
            shapes[f"decoder.layers.{layer}.moe_layer.gate.wg.weight"] = (EXPERTS, D)
            for expert in range(EXPERTS):
                parts |= {f"moe_layer.experts.{expert}.fc1": (F, D), f"moe_layer.experts.{expert}.fc2": (D, F)}
        else:
            parts |= {"fc1": (F, D), "fc2": (D, F)}
        for name, shape in parts.items():
            shapes |= {
                f"decoder.layers.{layer}.{name}.weight": shape,
                f"decoder.layers.{layer}.{name}.bias": shape[:1],
            }
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"decoder.layers.{layer}.{norm}.{kind}": (D,) for kind in ("weight", "bias")}
    shapes |= {"decoder.layer_norm.weight": (D,), "decoder.layer_norm.bias": (D,)}
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def write(
    folder: Path, held: dict[str, torch.Tensor], args: Any, *, newer: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the files of one checkpoint: shared weights, and two experts of each layer in each of three files."""
    told = {"args": None, "cfg": {"model": args}} if newer else {"args": args, "cfg": None}
    shared = {name: value.to(dtype) for name, value in held.items() if ".experts." not in name}
    shared["decoder.output_projection.weight"] = shared["decoder.embed_tokens.weight"]
    shared |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    torch.save({**told, "model": shared, "extra_state": {"epoch": 1}}, folder / "checkpoint_last-shared.pt")
    for rank in range(RANKS):
        local = {}
        for own in range(EXPERTS // RANKS):
            here = f".experts.{rank * EXPERTS // RANKS + own}."
            local |= {k.replace(here, f".experts.{own}."): v.to(dtype) for k, v in held.items() if here in k}
        torch.save({**told, "model": local}, folder / f"checkpoint_last-rank-{rank}.pt")
    return folder


def position(index: int, held: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the embedding of a position, of which fairseq numbers the first that is not padding by 2."""
    if "decoder.embed_positions.weight" in held:
        return held["decoder.embed_positions.weight"][index + 2]
    angles = torch.tensor([(index + 2) * math.exp(-math.log(10000) / (D // 2 - 1) * place) for place in range(D // 2)])
    return torch.cat([angles.sin(), angles.cos()])


def expected(held: dict[str, torch.Tensor], args: dict[str, Any], ids: list[int], capacity: int) -> torch.Tensor:
    """Return the logits [S, V] of one row by loops over layers, heads, tokens and experts."""
    scale = 1.0 if args["no_scale_embedding"] else math.sqrt(D)
    x = torch.stack([held["decoder.embed_tokens.weight"][i] * scale + position(s, held) for s, i in enumerate(ids)])
    for layer in range(LAYERS):
        own = {k.removeprefix(f"decoder.layers.{layer}."): v for k, v in held.items() if f"layers.{layer}." in k}
        linear = lambda name, x, own=own: x @ own[f"{name}.weight"].T + own[f"{name}.bias"]  # noqa: E731
        norm = lambda name, x, own=own: functional.layer_norm(x, (D,), own[f"{name}.weight"], own[f"{name}.bias"])  # noqa: E731
        inner = norm("self_attn_layer_norm", x)
        query, key, value = (linear(f"self_attn.{name}_proj", inner).view(-1, HEADS, D // HEADS) for name in "qkv")
        heads = torch.empty(len(ids), HEADS, D // HEADS)
        for token in range(len(ids)):
            for head in range(HEADS):
                scores = key[: token + 1, head] @ query[token, head] / math.sqrt(D // HEADS)
                heads[token, head] = scores.softmax(0) @ value[: token + 1, head]
        x = x + linear("self_attn.out_proj", heads.flatten(1))
        inner, act = norm("final_layer_norm", x), ACTIVATIONS[args["activation_fn"]]
        if layer % 2 == 0:
            x = x + linear("fc2", act(linear("fc1", inner)))
            continue
        taken = [0] * EXPERTS
        for token, row in enumerate(inner):
            gates = (own["moe_layer.gate.wg.weight"] @ row).softmax(0)
            picks = sorted(range(EXPERTS), key=lambda e, gates=gates: -float(gates[e]))[:2]
            for pick in picks:
                taken[pick] += 1
                path = f"moe_layer.experts.{pick}"
                share = gates[pick] / (gates[picks[0]] + gates[picks[1]])
                x[token] = x[token] + share * linear(f"{path}.fc2", act(linear(f"{path}.fc1", row)))
        assert max(taken) <= capacity, "fairseq would have dropped a token here"
    return functional.layer_norm(x, (D,), held["decoder.layer_norm.weight"], held["decoder.layer_norm.bias"]) @ (
        held["decoder.embed_tokens.weight"].T
    )


@pytest.mark.parametrize(
    ("learned", "newer", "changed"),
    {
        "as released": (False, True, {}),
        "older, not scaled": (False, False, {"no_scale_embedding": True, "activation_fn": "relu"}),
        "learned positions": (True, True, {"no_scale_embedding": True, "activation_fn": "gelu_accurate"}),
    }.values(),
)
def test_logits_are_those_of_the_checkpoints_weights(
    learned: bool, newer: bool, changed: dict, tmp_path: Path
) -> None:
    held, args = weights(learned), options(**changed)
    model = convert_fairseq_moe(write(tmp_path, held, Namespace(**args) if not newer else args, newer=newer))
    rows = [[2, 5, 17, 8, 31, 9, 4], [2, 39, 3, 3, 12, 30, 6]]
    found = logits(model, {"input_ids": torch.tensor(rows)})
    for row, ids in zip(found, rows, strict=True):
        torch.testing.assert_close(row, expected(held, args, ids, capacity=len(ids)), atol=1e-4, rtol=1e-4)


def test_padding_on_the_left_changes_nothing_when_it_generates(tmp_path: Path) -> None:
    model = convert_fairseq_moe(write(tmp_path, weights(), options()))
    ids, padded = torch.tensor([[2, 5, 17]]), torch.tensor([[1, 1, 2, 5, 17]])
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    found = model.generate(
        padded, attention_mask=(padded != 1).long(), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert found[0, 2:].tolist() == plain[0].tolist()


@pytest.mark.parametrize("learned", [False, True])
def test_it_is_saved_with_its_code_in_the_dtype_of_the_checkpoint(learned: bool, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    args = options(no_scale_embedding=learned)
    model = convert_fairseq_moe(write(tmp_path / "given", weights(learned), args, dtype=torch.float16))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16}
    model.save_pretrained(tmp_path / "saved")
    assert {"fairseq_moe_mcsmoe.py", "variant_experts_mcsmoe.py"} <= {
        x.name for x in (tmp_path / "saved").glob("*.py")
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = {"input_ids": torch.tensor([[2, 5, 17, 8]])}
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_statistics_are_collected_of_it_and_k_can_be_set(tmp_path: Path) -> None:
    held = weights()
    model = convert_fairseq_moe(write(tmp_path, held, options()))
    assert [(x.name, x.num_experts, x.top_k, x.hidden_size, x.intermediate_size) for x in moe_layers(model)] == [
        (f"model.layers.{layer}.moe_layer.experts", EXPERTS, 2, D, F) for layer in (1, 3)
    ]
    batch = {"input_ids": torch.randint(4, VOCAB, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs: list[torch.Tensor] = []
    hook = model.model.layers[1].moe_layer.register_forward_hook(lambda m, given, out: inputs.append(given[0]))
    model(**batch)
    hook.remove()
    picks = (inputs[0].flatten(0, 1) @ held["decoder.layers.1.moe_layer.gate.wg.weight"].T).topk(2).indices
    layer = collect_statistics(model, [batch])["model.layers.1.moe_layer.experts"]
    assert layer.counts.tolist() == torch.bincount(picks.flatten(), minlength=EXPERTS).tolist()
    set_top_k(model, 1)
    assert (get_top_k(model), model.config.variant["options"]["top_k"]) == (1, 1)


def test_it_is_not_merged(tmp_path: Path) -> None:
    model = convert_fairseq_moe(write(tmp_path, weights(), options()))
    with pytest.raises(ValueError, match="only models of Transformers itself are supported"):
        compress(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], MergeConfig(experts=3))


def test_numbers_of_the_training_are_read_by_either_name_of_numpy(tmp_path: Path) -> None:
    write(tmp_path, weights(), options())
    file = tmp_path / "checkpoint_last-shared.pt"
    _changed(tmp_path, "shared", lambda held: held.update(extra_state={"best": numpy.float64(2.5)}))
    expected = convert_fairseq_moe(tmp_path).state_dict()
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"numpy._core.multiarray" in value for value in held.values())
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in held.items():
            archive.writestr(name, value.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = convert_fairseq_moe(tmp_path).state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())


def _without(folder: Path, name: str) -> None:
    (folder / f"checkpoint_last-{name}.pt").unlink()


def _cut(folder: Path, name: str) -> None:
    file = folder / f"checkpoint_last-{name}.pt"
    file.write_bytes(file.read_bytes()[:700])


def _changed(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    file = folder / f"checkpoint_last-{name}.pt"
    held = torch.load(file, weights_only=False)
    change(held)
    torch.save(held, file)


def _rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda held: held["model"].update({new: held["model"].pop(old)})


FC1 = "decoder.layers.3.moe_layer.experts.1.fc1.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "no shared file": (lambda f: _without(f, "shared"), "must be a file NAME-shared.pt"),
        "no rank": (lambda f: _without(f, "rank-2"), "rank-2.pt is missing: copy it"),
        "cut": (lambda f: _cut(f, "rank-1"), "rank-1.pt is damaged"),
        "no checkpoint": (lambda f: _changed(f, "rank-1", lambda held: held.pop("model")), "it has no `model`"),
        "objects": (lambda f: _changed(f, "rank-0", lambda held: held.update(x=Path())), "holds objects besides"),
        "no options": (
            lambda f: [_changed(f, n, lambda held: held.update(args=None)) for n in ("shared", "rank-0")],
            "tells no decoder_layers",
        ),
        "no width": (
            lambda f: _changed(f, "shared", lambda held: held["args"].pop("decoder_ffn_embed_dim")),
            "shared.pt tells no decoder_ffn_embed_dim",
        ),
        "no embedding": (
            lambda f: _changed(f, "shared", lambda h: h["model"].pop("decoder.embed_tokens.weight")),
            "lacks decoder.embed_tokens.weight: it is of no decoder",
        ),
        "lacks": (lambda f: _changed(f, "rank-2", lambda h: h["model"].pop(FC1)), r"lacks weights .*up_proj\[5\]"),
        "lacks a norm": (
            lambda f: _changed(f, "shared", lambda h: h["model"].pop("decoder.layer_norm.bias")),
            "lacks model.layer_norm.bias",
        ),
        "unknown": (lambda f: _changed(f, "shared", _rename("decoder.layer_norm.bias", "x")), "x .* no place there"),
        "shape": (
            lambda f: _changed(f, "rank-1", lambda h: h["model"].update({FC1: torch.zeros(2, D)})),
            r"fc1.weight \[2, 16\] should be \[24, 16\]",
        ),
    }.values(),
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path, weights(), options())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert_fairseq_moe(tmp_path)


@pytest.mark.parametrize(
    ("changed", "learned", "message"),
    {
        "after": ({"decoder_normalize_before": False}, False, "decoder_normalize_before=False; only True"),
        "top 1": ({"moe_top1_expert": True}, False, "moe_top1_expert=True; only False"),
        "activation": ({"activation_fn": "tanh"}, False, "activation_fn='tanh'"),
        "no positions": ({"no_token_positional_embeddings": True}, False, "positional_embeddings=True; only False"),
        "both": ({}, True, "learned positions and scaled embeddings"),
    }.values(),
)
def test_a_model_that_is_built_otherwise_is_refused(
    changed: dict, learned: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_fairseq_moe(write(tmp_path, weights(learned), options(**changed)))


def test_a_second_expert_of_chance_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="moe_second_expert_policy='sampling'"):
        convert_fairseq_moe(write(tmp_path, weights(), options(moe_second_expert_policy="sampling")))
