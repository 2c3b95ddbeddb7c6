"""Models of fairseq converted: logits are those of the checkpoint, and what cannot be read is refused."""

import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from fairseq_files import EXPERTS, VOCAB, D, F, expected, options, weights, write
from helpers import logits
from transformers import AutoModelForCausalLM

from hf_mcsmoe import collect_statistics, moe_layers
from hf_mcsmoe.variants import convert_fairseq_moe, get_top_k, set_top_k


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
