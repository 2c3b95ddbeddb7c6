"""Checkpoints of fairseq's layout, made here, and what their models compute, by loops over plain tensors."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from oracle import Token
from torch.nn import functional

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


def expected(
    held: dict[str, torch.Tensor],
    args: dict[str, Any],
    ids: list[int],
    capacity: int,
    seen: dict[int, list[Token]] | None = None,
) -> torch.Tensor:
    """Return the logits [S, V] of one row by loops over layers, heads, tokens and experts.

    Args:
        seen: where to write down what the router of a layer does with each token.
    """
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
            scores = own["moe_layer.gate.wg.weight"] @ row
            gates = scores.softmax(0)
            picks = sorted(range(EXPERTS), key=lambda e, gates=gates: -float(gates[e]))[:2]
            if seen is not None:
                seen.setdefault(layer, []).append(Token(scores.tolist(), [(e, float(gates[e])) for e in picks], False))
            for pick in picks:
                taken[pick] += 1
                path = f"moe_layer.experts.{pick}"
                share = gates[pick] / (gates[picks[0]] + gates[picks[1]])
                x[token] = x[token] + share * linear(f"{path}.fc2", act(linear(f"{path}.fc1", row)))
        assert max(taken) <= capacity, "fairseq would have dropped a token here"
    return functional.layer_norm(x, (D,), held["decoder.layer_norm.weight"], held["decoder.layer_norm.bias"]) @ (
        held["decoder.embed_tokens.weight"].T
    )
