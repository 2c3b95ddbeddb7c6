"""Models whose experts go while they are trained: the form that allows it, and one layer pruned in place.

Weights of experts that are gone leave the memory, and routers pick among the others, as the family does it; nothing is
masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, new_record
from hf_mcsmoe.layers.extra import extra_blocks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.fused import fused_views
from hf_mcsmoe.methods.experts import Expert
from hf_mcsmoe.modeling.auto import register_family
from hf_mcsmoe.modeling.companions_mcsmoe import remember_source
from hf_mcsmoe.modeling.convert import convert_model, drop_blocks, write_description
from hf_mcsmoe.modeling.modeling_mcsmoe import adopt_inner_models, install_pruned
from hf_mcsmoe.modeling.plain_mcsmoe import expert_fields
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_of, cut_router, kept_entries
from hf_mcsmoe.modeling.router_mcsmoe import map_of
from hf_mcsmoe.plan import LayerPlan


def prepare_pruning(model: PreTrainedModel, skip: Sequence[str] = ()) -> PreTrainedModel:
    """Turn an original model, in place, into one whose experts can be pruned while it is trained; returns it.

    It computes what it did: all experts are kept so far.

    Args:
        skip: patterns of the names of layers to leave whole.

    Raises:
        ValueError: the model is compressed already, layers share their experts, or see `Layers.selected`.
    """
    layers = Layers.of(model).uncompressed()
    chosen = layers.selected(skip)
    if shared := next((tied for tied in chosen.tied if len(tied) > 1), None):
        names = ", ".join(layer.name for layer in shared)
        raise ValueError(f"{names} share their experts, which are not pruned while they learn: name them in `skip`.")
    whole = [layer.name for layer in layers if layer.name not in chosen.names]
    extra = extra_blocks(layers.source)
    remember_source(model, model.name_or_path or "")
    convert_model(model)
    drop_blocks(model, extra)
    for layer in chosen:
        experts = [_copied(expert) for expert in map(layer.read().expert, range(layer.num_experts))]
        target = fused_views(install_pruned(model, layer.name, layer.num_experts, list(range(layer.num_experts))))
        for number, expert in enumerate(experts):
            target.set_expert(number, expert)
    _finish(model, whole)
    attach_record(model, new_record(model, {}))
    return model


def recall_pruning(model: PreTrainedModel, plans: Mapping[str, LayerPlan]) -> PreTrainedModel:
    """Let a pruned model that was saved as one of its family's own be a compressed one again, in place; returns it.

    Args:
        plans: what lies beside its weights says of its layers.

    Raises:
        ValueError: the plan is of other experts.
    """
    layers = Layers.of(model).uncompressed()
    kept = {name: plan.kept for name, plan in plans.items() if plan.kept is not None}
    if [(layer.name, layer.num_experts) for layer in layers] != [(name, len(kept[name])) for name in kept]:
        raise ValueError("The plan beside the model is of other layers or experts: take it from the original folder.")
    prepare_pruning(model)
    for name, experts in kept.items():
        before = len(plans[name].expert_map)
        router = cut_of(model, name)
        router.kept_experts, router.num_cut = list(experts), before - len(experts)
        for part, key in expert_fields(model.config.get_text_config(), len(experts)):
            setattr(part, key, before)
    write_description(model)
    vars(model).pop("mcsmoe_record", None)  # that of its folder tells more
    return model


def _copied(expert: Expert) -> Expert:
    return {role: tensor.detach().clone() for role, tensor in expert.items()}


def _finish(model: Any, whole: Sequence[str]) -> None:
    write_description(model, whole=whole)
    adopt_inner_models(model)
    register_family(type(model.config))


def prune_layer(model: PreTrainedModel, name: str, places: Sequence[int], optimizer: Any = None) -> None:
    """Leave of a layer's present experts those at `places`, rising, in place, and cut its router to them.

    Args:
        name: of the experts container, in a model that `prepare_pruning` made.
        optimizer: which trains the model, and forgets what it knows of the others.
    """
    container: Any = model.get_submodule(name)
    router, number = cut_of(model, name), len(places)
    before, experts = dict(model.named_parameters()), list(router.kept_experts)
    gone = router.num_cut + len(experts) - number
    for key, parameter in list(container.named_parameters(recurse=False)):
        values = kept_entries(parameter, 0, len(experts), places)
        setattr(container, key, nn.Parameter(values, parameter.requires_grad))
    container.num_experts = number
    cut_router(model, name, len(experts), places)
    router.kept_experts, router.num_cut = [experts[place] for place in places], gone
    if (owner := map_of(model, name)) is not None:  # a block that stands for one of a family outside the interface
        owner.set_expert_map(list(range(number)), owner.expert_map.device)
    write_description(model)
    if optimizer is not None:
        for path, parameter in model.named_parameters():
            if parameter is not before[path]:
                _exchange(optimizer, before[path], parameter, len(experts), places)


def _exchange(optimizer: Any, old: nn.Parameter, new: nn.Parameter, num_experts: int, places: Sequence[int]) -> None:
    """Let an optimizer train `new` in place of `old`, of which it has the entries of the experts that stay.

    What it remembers of another shape than the parameter's is forgotten.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    known = optimizer.state.pop(old, {})
    axis = next(axis for axis, (size, left) in enumerate(zip(old.shape, new.shape, strict=True)) if size != left)
    tensors = {name: value for name, value in known.items() if isinstance(value, torch.Tensor) and value.ndim}
    if known and all(value.shape == old.shape for value in tensors.values()):
        cut = {name: kept_entries(value, axis, num_experts, places) for name, value in tensors.items()}
        optimizer.state[new] = {**known, **cut}
