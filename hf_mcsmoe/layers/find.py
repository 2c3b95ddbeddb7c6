"""Where each architecture keeps its experts: `moe_layers` finds them, an adapter a kind of container reads them."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.layers.fused import FusedLayer, fused_sizes, fused_views, is_fused
from hf_mcsmoe.layers.layer import MoELayer, find_router
from hf_mcsmoe.layers.offloading import onloaded
from hf_mcsmoe.layers.outside import REFUSED, DbrxLayer, JetMoeLayer, Llama4Layer, SwitchLayer
from hf_mcsmoe.modeling.router_mcsmoe import map_of

__all__ = ["MoELayer", "fused_views", "moe_layers"]

# Parts of a multimodal model that are not its text part; their experts stay as they are.
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech", "talker")

# Per class of container: adapter, and its (E, D, F). The experts interface needs no entry.
OUTSIDE: dict[str, tuple[type[MoELayer], Callable[[Any], tuple[int, int, int]]]] = {
    "SwitchTransformersExperts": (SwitchLayer, lambda c: (len(c), *c["expert_0"].wo.weight.shape)),
    "Llama4TextExperts": (Llama4Layer, lambda c: (c.num_experts, c.hidden_size, c.expert_dim)),
    "JetMoeMoE": (JetMoeLayer, lambda c: (c.input_linear.num_experts, c.input_size, c.hidden_size)),
    "DbrxExperts": (DbrxLayer, lambda c: (c.num_experts, c.hidden_size, c.ffn_hidden_size)),
}

TOP_K_FIELDS = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Return the model's layers of experts, in the order of its modules.

    Experts of vision, audio and speech parts and shared experts are left out. In an already compressed model the
    layers have `merged` set, and `num_experts` counts the stored experts.

    Raises:
        ValueError: the model is quantized, has no experts, or experts of a kind that cannot be merged.
    """
    _check_not_quantized(model)
    layers = [_layer(model, name, module) for name, module in model.named_modules() if _is_text_experts(name, module)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layer in its text part. hf_mcsmoe merges experts of "
            "sparse models (Mixtral, Qwen3-MoE, OLMoE, gpt-oss, Switch Transformers ...); a dense model has none."
        )
    return layers


def _check_not_quantized(model: nn.Module) -> None:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise ValueError(
            f"{type(model).__name__} is quantized ({getattr(method, 'value', method)}), and packed weights cannot be "
            "averaged. Load it dequantized (the original checkpoint, or a `quantization_config` with "
            "`dequantize=True`, where its method has that), save it, merge it, and quantize the result."
        )


def _is_text_experts(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if any(tower in part for part in name.split(".") for tower in OTHER_TOWERS):
        return False
    if kind in REFUSED:
        raise ValueError(f"The experts of {name!r} ({kind}) cannot be merged: {REFUSED[kind]}.")
    return kind in OUTSIDE or is_fused(module)


def _layer(model: PreTrainedModel, name: str, module: nn.Module) -> MoELayer:
    merged = map_of(model, name) is not None
    if not merged and type(module).__name__ in OUTSIDE:
        adapter, measure = OUTSIDE[type(module).__name__]
        sizes = measure(module)
    else:
        adapter, sizes = FusedLayer, fused_sizes(module)
    return adapter(name, model, module, sizes[0], _top_k(model, name), *sizes[1:], merged)


def _top_k(model: PreTrainedModel, name: str) -> int | None:
    """Return how many experts a token picks, from the router, the block or the configuration; None where unsaid."""
    try:
        router = find_router(model, name)
    except ValueError:
        router = None
    block = model.get_submodule(name.rpartition(".")[0])
    for owner in (router, block, model.config.get_text_config()):
        for field in TOP_K_FIELDS:
            if isinstance(value := getattr(owner, field, None), int):
                return value
    return 1 if type(block).__name__.startswith(("Switch", "MergedSwitch")) else None


def uncompressed_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Return the model's layers of experts.

    Raises:
        ValueError: the model is compressed already.
    """
    layers = moe_layers(model)
    if any(layer.merged for layer in layers) or getattr(model.config, "mcsmoe", None):
        raise ValueError(
            "This model is compressed already. Its routers still speak of the original experts, which are gone: merge "
            "the original model again with a smaller `experts` instead of merging twice."
        )
    return layers


def fingerprint(layers: list[MoELayer]) -> str:
    """Return a hash of the layers' names and sizes, of their routers and of the model's norms and biases.

    Cheap to read, changed by any training, and the same in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.name} {layer.num_experts} {layer.hidden_size} {layer.intermediate_size}".encode())
        _add_weights(digest, layer.router)
    for module in layers[0].model.modules():
        if not any(module.children()) and any(parameter.ndim == 1 for parameter in module.parameters()):
            _add_weights(digest, module)
    return digest.hexdigest()


def _add_weights(digest: Any, module: nn.Module) -> None:
    with onloaded(module):
        for parameter in module.parameters():
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy().tobytes())


def tied_layers(layers: list[MoELayer]) -> list[list[MoELayer]]:
    """Return the layers in lists that share one set of experts (an encoder tied to a decoder); mostly lists of one."""
    shared: dict[int, list[MoELayer]] = {}
    for layer in layers:
        shared.setdefault(id(layer.parameters[0][1]), []).append(layer)
    return list(shared.values())
