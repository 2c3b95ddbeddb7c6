"""Narrower experts: the key of a configuration that says how wide experts are, and containers of another width."""

import copy
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.layers.find import Layers


def narrow_model(layers: Layers, width: int) -> tuple[str, PreTrainedModel]:
    """Return the key of the configuration that says how wide experts are, and a model of that width, without weights.

    Raises:
        ValueError: no key says that of the experts alone, or experts are not all of one width.
    """
    model, before = layers.model, {layer.intermediate_size for layer in layers}
    if len(before) > 1:
        raise ValueError(f"Experts are {', '.join(map(str, sorted(before)))} wide: hidden units go of one width only.")
    (own,) = before
    keys = [key for key, value in vars(model.config.get_text_config()).items() if value == own and type(value) is int]
    for key in keys:
        narrower = _with_width(model, key, width)
        if narrower is not None and _differ_in_experts_alone(layers, narrower):
            return key, narrower
    told = (
        f"{', '.join(keys)} of its configuration is of other layers as well" if keys else "its configuration has none"
    )
    raise ValueError(
        f"{type(model).__name__} has no key for the width of its experts alone ({told}), so hidden units cannot go "
        "from a checkpoint of the family: choose the pattern unstructured or 2:4, or fewer experts."
    )


def _with_width(model: PreTrainedModel, key: str, width: int) -> PreTrainedModel | None:
    """Return a model without weights whose configuration says another width; None where it makes no model."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    setattr(config.get_text_config(), key, width)
    try:
        with torch.device("meta"):
            return cast(Any, type(model)(config)).to(model.dtype)
    except (ValueError, RuntimeError):
        return None


def _differ_in_experts_alone(layers: Layers, narrower: PreTrainedModel) -> bool:
    """Tell whether another model has a tensor of other sizes in each container of experts, and nowhere else."""
    ours, theirs = _shapes(layers.model), _shapes(narrower)
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    prefixes = [f"{layer.name}." for layer in layers]
    inside = all(any(key.startswith(prefix) for prefix in prefixes) for key in changed)
    return inside and all(any(key.startswith(prefix) for key in changed) for prefix in prefixes)


def _shapes(model: PreTrainedModel) -> dict[str, Any]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def put_container(model: PreTrainedModel, name: str, narrower: PreTrainedModel) -> Any:
    """Put the experts' container of a model without weights in the place of a model's own, with memory; returns it."""
    old, new = model.get_submodule(name), narrower.get_submodule(name)
    like = next(old.parameters())
    new.to_empty(device=like.device).to(like.dtype).train(old.training).requires_grad_(like.requires_grad)
    for path, buffer in old.named_buffers():
        owner, _, own = path.rpartition(".")
        new.get_submodule(owner)._buffers[own] = buffer
    own_weights = dict(new.named_parameters())
    with torch.no_grad():
        for path, parameter in old.named_parameters():
            if own_weights[path].shape == parameter.shape:  # of a norm behind the experts, say
                own_weights[path].copy_(parameter)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)
    return new
