"""Turning a library model into one with merged experts, where the package is installed. Does not travel."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.modeling.configuration_mcsmoe import FORMAT_VERSION, config_class_for, family_of
from hf_mcsmoe.modeling.constants_mcsmoe import num_constants
from hf_mcsmoe.modeling.experts_mcsmoe import MergedJetMoeMoE
from hf_mcsmoe.modeling.forward_mcsmoe import low_rank_of
from hf_mcsmoe.modeling.modeling_mcsmoe import inner_experts, layer_path, merged_class, prefer_ours
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_routers
from hf_mcsmoe.modeling.quantized_mcsmoe import quantized_of
from hf_mcsmoe.modeling.router_mcsmoe import expert_maps

# What families call the number of layers that predict further tokens, which no model of Transformers holds.
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def convert_model(model: PreTrainedModel) -> None:
    """Turn a base model, in place, into the generated class; its layers are still to be installed, and described."""
    target = merged_class(type(model))  # first, since it may refuse
    _convert_config(model.config)
    prefer_ours(model.config, [None, "grouped_mm"])  # the library's own choice where the user made none
    model.__class__ = target
    # Set by a load of the base model; a save would apply the reverse to the merged experts.
    vars(model).pop("_weight_conversions", None)
    write_description(model)


def _convert_config(config: PreTrainedConfig) -> None:
    """Turn the configuration object of a base model, in place, into that of a merged model."""
    base_model_type, variant = family_of(type(config))
    config.__class__ = config_class_for(base_model_type, variant)
    # An instance attribute would win over the class: the base's name would then choose the base's weight conversions.
    for stale in ("model_type", "auto_map", "architectures"):
        vars(config).pop(stale, None)
    config.base_model_type = base_model_type


def drop_blocks(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Let the configuration say that a result lacks these blocks of its source, and count no layers for them."""
    if not paths:
        return
    model.config.mcsmoe = {**model.config.mcsmoe, "dropped": list(paths)}
    for config in (model.config, model.config.get_text_config()):
        for name in MTP_FIELDS:
            if getattr(config, name, None):
                setattr(config, name, 0)


def write_description(model: nn.Module, *, keep: float | None = None, whole: Sequence[str] | None = None) -> None:
    """Let `config.mcsmoe` say what the model's modules hold; nothing else writes it.

    Args:
        keep: share of the rows of S that is to be left; None leaves what the configuration says.
        whole: names of the layers of which all experts were kept; None leaves what the configuration says.
    """
    given = {"keep": keep, "whole": None if whole is None else list(whole)}
    model.config.mcsmoe = describe(model) | {key: value for key, value in given.items() if value is not None}


def describe(model: nn.Module) -> dict[str, Any]:
    """Return `config.mcsmoe` as the model's modules have it.

    `keep`, the share of rows of S that is to be left, `whole`, the layers of which all experts were kept, and
    `dropped`, the blocks that the model's class does not read, are no modules' business: they stay as the
    configuration has them.
    """
    old = model.config.mcsmoe or {"layers": {}}
    # A bare model and one with a head call the same layer by two names; either is read (see `layer_path`).
    names = {layer_path(model, name): name for name in old["layers"]}
    layers: dict[str, dict] = {}
    for path, layer in _reductions(model).items():
        experts = inner_experts(model.get_submodule(path))
        if low_rank := low_rank_of(experts):
            layer["low_rank"] = {weight: dict(entry) for weight, entry in low_rank.items()}
        if quantized := quantized_of(experts):
            layer["quantized"] = {weight: dict(entry) for weight, entry in quantized.items()}
        layers[names.get(path, path)] = layer
    kept = {key: old[key] for key in ("keep", "whole", "dropped") if key in old}
    return {"format_version": FORMAT_VERSION, "layers": layers, **kept}


def _reductions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by the path of each changed experts container what it was, and its map or the experts it kept."""
    layers: dict[str, dict[str, Any]] = {}
    for path, owner in expert_maps(model):
        expert_map = list(owner.expert_map_values)
        path = _container_path(model, path, owner)
        layers[path] = {"num_experts": len(expert_map), "expert_map": expert_map}
        number = num_constants(inner_experts(model.get_submodule(path)))
        if number:
            gone = [expert for expert, at in enumerate(expert_map) if at > max(expert_map) - number]
            layers[path]["approximate_experts"] = gone
    for path, router in cut_routers(model):
        block = path.rpartition(".")[0]
        path = _container_path(model, block, model.get_submodule(block))
        kept = list(router.kept_experts)
        layers[path] = {"num_experts": len(kept) + router.num_cut, "kept": kept}
    # In the order of the model's modules.
    return {path: layers[path] for path, _ in model.named_modules() if path in layers}


def _container_path(model: nn.Module, path: str, owner: nn.Module) -> str:
    """Return the path of the experts container, as a layer is called, whose picks the module at `path` maps."""
    if type(owner).__name__ == MergedJetMoeMoE.__name__:  # the block is the container
        return path
    block = path if hasattr(owner, "experts") else path.rpartition(".")[0]
    return f"{block}.experts"
