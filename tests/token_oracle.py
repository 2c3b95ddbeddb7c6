"""What each expert of a model computes with, token by token: the oracle that sums of a pass are compared with."""

from typing import Any

import torch
from families import build
from helpers import Batch, Expert, batches
from transformers import PreTrainedModel

from hf_mcsmoe import collect_statistics, moe_layers
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.view import Sums


def tokens_of(model: PreTrainedModel, batch: Batch) -> dict[str, list[tuple[torch.Tensor, list[int], list[float]]]]:
    """Return the input, picks and weights of each token that counts, by layer, as the experts are called."""
    seen: dict[str, list[tuple[torch.Tensor, list[int], list[float]]]] = {}
    handles = []
    for layer in moe_layers(model):

        def hook(module: Any, arguments: tuple, name: str = layer.name) -> None:
            keep = batch["attention_mask"].flatten().tolist()
            rows = zip(keep, arguments[0], arguments[1].tolist(), arguments[2].tolist(), strict=True)
            seen.setdefault(name, []).extend((x, picks, weights) for kept, x, picks, weights in rows if kept)

        handles.append(layer.container.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def output_of(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """Compute the output of one expert for one token."""
    if "gate" in expert:
        return expert["down"] @ (torch.nn.functional.silu(expert["gate"] @ x) * (expert["up"] @ x))
    return expert["down"] @ torch.relu(expert["up"] @ x).square()  # Nemotron-H


def collected(name: str, needs: list[str]) -> tuple[PreTrainedModel, dict[str, Sums], dict[str, list]]:
    """Return a model, its sums over two batches, and the tokens of these by layer."""
    model = build(name)
    data = batches(name, model)
    tokens: dict[str, list] = {}
    for batch in data:
        for layer, found in tokens_of(model, batch).items():
            tokens.setdefault(layer, []).extend(found)
    return model, collect_statistics(model, data, needs).layers, tokens


def answers(model: PreTrainedModel, stage: str, method: str, sums: dict[str, Sums]) -> dict[str, torch.Tensor]:
    """Return what a method says of each layer."""
    found = {}
    for layer in moe_layers(model):
        with layer.view(sums[layer.name], 0) as view:
            found[layer.name] = REGISTRIES[stage][method](view)
    return found
