"""M-SMoE from top to bottom: statistics, plan, then layer by layer read, align, merge, write (paper, section 3.1)."""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.adapters import MoELayer, fused_views
from hf_mcsmoe.alignment import ALIGNMENT
from hf_mcsmoe.calibration import Batch, collect_statistics, fingerprint, onloaded, uncompressed_layers
from hf_mcsmoe.config import MergeConfig
from hf_mcsmoe.experts import ExpertWeights
from hf_mcsmoe.merging import merge_group
from hf_mcsmoe.model_card import model_card
from hf_mcsmoe.modeling.auto import register_family
from hf_mcsmoe.modeling.modeling_mcsmoe import adopt_inner_models, convert_model, install_layer
from hf_mcsmoe.plan import LayerPlan, MergePlan, plan_merge, selected_layers, tied_layers

PLAN_FILE = "mcsmoe_plan.json"
Progress = Callable[[str, int, int], None]


def compress(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    config: MergeConfig | None = None,
    *,
    consume: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Return `model` with merged experts: statistics over `batches`, plan, merge.

    Args:
        consume: see `merge_experts`.
        progress: called as `progress(layer name, layers done, layers)` while merging.

    Raises:
        ValueError: see `collect_statistics`, `plan_merge` and `merge_experts`. Options are checked before any forward.
    """
    config = config or MergeConfig()
    selected_layers(uncompressed_layers(model), config)
    statistics = collect_statistics(model, batches)
    return merge_experts(model, plan_merge(model, statistics, config), consume=consume, progress=progress)


def merge_experts(
    model: PreTrainedModel, plan: MergePlan, *, consume: bool = False, progress: Progress | None = None
) -> PreTrainedModel:
    """Return a model of a subclass of `type(model)` whose layers hold the merged experts of `plan`.

    Args:
        consume: turn `model` itself into the result, freeing each layer's experts as it goes; otherwise it stays
            usable and unchanged, and the result shares no memory with it.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: a plan of another model, or weights that are not finite; raised before anything is changed.
    """
    layers = {layer.name: layer for layer in uncompressed_layers(model)}
    _check_plan(layers, plan)
    before = [sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())]
    tables = {name: (layers[name].num_experts, len(item.dominant)) for name, item in plan.layers.items()}
    merged = {name: item for name, item in plan.layers.items() if not item.is_whole}
    result, done = _prepare(model, [layers[name] for name in merged], consume), 0
    convert_model(
        result,
        {name: {"num_experts": len(item.expert_map), "expert_map": item.expert_map} for name, item in merged.items()},
    )
    for tied in tied_layers([layers.pop(name) for name in merged]):
        first, *others = tied
        experts = _merge_layer(first, merged[first.name], result, plan.config)
        for layer in others:
            _tie(install_layer(result, layer.name, merged[layer.name].expert_map), experts)
        done += len(tied)
        if progress:
            progress(first.name, done, len(merged))
    adopt_inner_models(result)
    _redispatch(result)
    register_family(result.config.base_model_type)
    result.mcsmoe_files = {PLAN_FILE: plan.to_json(), "README.md": model_card(result, plan, tables, before)}
    return result


def _check_plan(layers: dict[str, MoELayer], plan: MergePlan) -> None:
    unknown = [name for name in plan.layers if name not in layers]
    if unknown or fingerprint(list(layers.values())) != plan.fingerprint:
        raise ValueError("The plan was made for another model; make one with plan_merge for this one.")
    for name in plan.layers:
        with onloaded(layers[name].container):
            weights = layers[name].read()
            for expert in range(len(weights)):
                if not all(tensor.sum(dtype=torch.float32).isfinite() for tensor in weights.expert(expert).values()):
                    raise ValueError(f"Expert {expert} of {name} holds NaN or infinite weights; the checkpoint is damaged.")


def _merge_layer(layer: MoELayer, item: LayerPlan, result: PreTrainedModel, config: dict[str, Any]) -> nn.Module:
    """Read one layer, align and merge its experts group by group, and write them into `result`; returns them."""
    with onloaded(layer.container):
        weights = layer.read()
        device = weights.expert(0)["down"].device
        permutations = _alignments(weights, item, config)
        experts = install_layer(result, layer.name, item.expert_map)
        _materialise(experts, device)
        target = fused_views(experts)
        for group in range(len(item.dominant)):
            members = item.members(group)
            shares = [item.weights[member] for member in members]
            target.set_expert(group, merge_group(weights, members, shares, [permutations.get(m) for m in members]))
    return experts


def _tie(experts: nn.Module, source: nn.Module) -> None:
    """Let `experts` hold the parameters of `source`, as the two layers of the original did."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(experts, name, parameter)
    experts.set_expert_map(source.expert_map_values, source.expert_map.device)


def _alignments(weights: ExpertWeights, item: LayerPlan, config: dict[str, Any]) -> dict[int, torch.Tensor | None]:
    """Return a permutation int [F] per expert that has to be aligned, solved side by side.

    Experts alone in their group, references and members of weight 0 need none.
    """
    align = ALIGNMENT[config["alignment"]]
    first = config["reference"] == "first"
    shared = [group for group in range(len(item.dominant)) if len(item.members(group)) > 1]
    pairs = {
        member: 0 if first else item.dominant[group]
        for group in shared
        for member in item.members(group)
        if item.weights[member] != 0
    }
    pairs = {member: reference for member, reference in pairs.items() if member != reference}
    if all(weight in (0, 1) for weight in item.weights):
        return {}

    def solve(pair: tuple[int, int]) -> torch.Tensor | None:
        return align(weights.expert(pair[1]), weights.expert(pair[0]))

    # The assignment solver releases the interpreter; more threads than cores would only cost memory.
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        return dict(zip(pairs, pool.map(solve, pairs.items()), strict=True))


def _prepare(model: PreTrainedModel, layers: list[MoELayer], consume: bool) -> PreTrainedModel:
    """Return the model to be converted: `model` itself, or a copy of all of it but the experts that will be merged."""
    memo: dict[int, Any] = {}
    if not consume:
        for layer in layers:
            for _, parameter in layer.parameters:
                placeholder = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                memo[id(parameter)] = placeholder
    result = model if consume else copy.deepcopy(model, memo)
    if getattr(model, "hf_device_map", None) is not None:
        left_out = {f"{layer.name}.{name}" for layer in layers for name, _ in layer.parameters}
        _onload(model, result, left_out)
        remove_hook_from_submodules(result)
    return result


def _onload(model: PreTrainedModel, result: PreTrainedModel, left_out: set[str]) -> None:
    """Bring the parameters of `result` that Accelerate keeps off the device to the CPU, but for those left out."""
    for path, module in model.named_modules():
        offloaded = [
            name
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_meta and f"{path}.{name}" not in left_out
        ]
        if offloaded:
            with onloaded(module):
                loaded = {name: getattr(module, name).detach().cpu().clone() for name in offloaded}
            for name, tensor in loaded.items():
                setattr(result.get_submodule(path), name, nn.Parameter(tensor))


def _materialise(experts: nn.Module, device: torch.device) -> None:
    """Give experts that stand on the meta device memory on `device`."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.is_meta:
            memory = torch.empty_like(parameter, device=device)
            setattr(experts, name, nn.Parameter(memory, parameter.requires_grad))
    experts.set_expert_map(experts.expert_map_values, device)


def _redispatch(result: PreTrainedModel) -> None:
    """Spread the result over the devices of the original's map; one that was offloaded now lies on the CPU."""
    device_map = vars(result).pop("hf_device_map", None)
    devices = {str(device) for device in (device_map or {}).values()}
    if len(devices) > 1 and not devices & {"cpu", "disk"}:
        dispatch_model(result, device_map)
