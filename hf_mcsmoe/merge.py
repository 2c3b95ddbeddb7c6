"""The merge of a plan, layer by layer: read, align, merge, write (paper, section 3.1)."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from accelerate import dispatch_model
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, new_record
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs
from hf_mcsmoe.layers.extra import extra_blocks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.fused import fused_views
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.offloading import detach, detach_all, is_hooked, unhooked_copies
from hf_mcsmoe.layers.output import check_apart
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.layers.shards import ShardWriter
from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.assignment import assignment_bytes
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.config import CONSTANT, MAP, MIXED, SLICE, ZERO, constant_needs
from hf_mcsmoe.methods.experts import Expert, Experts
from hf_mcsmoe.methods.mean_output import mean_outputs
from hf_mcsmoe.methods.merging import MERGING, merge_group
from hf_mcsmoe.methods.view import LayerView, Sums
from hf_mcsmoe.modeling.auto import register_family
from hf_mcsmoe.modeling.companions_mcsmoe import remember_source
from hf_mcsmoe.modeling.constants_mcsmoe import num_constants
from hf_mcsmoe.modeling.convert import convert_model, drop_blocks, write_description
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder
from hf_mcsmoe.modeling.modeling_mcsmoe import adopt_inner_models, install_layer, install_pruned
from hf_mcsmoe.modeling.pruned_mcsmoe import check_cut, cut_tensors, kept_entries, set_tensor
from hf_mcsmoe.plan import LayerPlan, MergePlan
from hf_mcsmoe.processes import current

Progress = Callable[[str, int, int], None]
# Called with each layer of merged experts and its path in the result; it may move their weights to the meta device.
Sink = Callable[[str, nn.Module], None]


def merge_to_folder(
    source: Folder | Layers,
    plan: MergePlan,
    target: str | os.PathLike,
    *,
    statistics: RoutingStatistics | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the folder that `merge_experts` and `save_pretrained` would, with no more than one layer in memory.

    Args:
        source: the checkpoint to be merged, or its layers where they are found already.
        plan: made with `plan_merge` for the same checkpoint.
        target: the folder to be written; it is complete or not there.
        statistics: see `merge_experts`.
        progress: called as `progress(layer name, layers done, layers)`.

    Raises:
        ValueError: see `merge_experts`; a source that is no folder, or a target that is the source or lies in it.
    """
    layers = Layers.of(source)
    if not isinstance(layers.source, Folder):
        raise ValueError(
            f"{type(layers.model).__name__} is loaded, and not a `Folder(path)`: merge it with merge_experts, and "
            "save the result with save_pretrained."
        )
    path = Path(os.path.realpath(target))
    check_apart(path, {"the model": layers.model.name_or_path})
    with completed_folder(path) as folder:
        writer = ShardWriter(folder, layers.source)
        result = merge_experts(layers, plan, statistics=statistics, progress=progress, sink=writer.write)
        writer.write_rest(result)
        cast(Any, result)._save_into(path, folder, path.name, state_dict={})
        writer.close()


def merge_experts(
    model: PreTrainedModel | Layers,
    plan: MergePlan,
    *,
    statistics: RoutingStatistics | None = None,
    consume: bool = False,
    progress: Progress | None = None,
    sink: Sink | None = None,
) -> PreTrainedModel:
    """Return a model of a subclass of `type(model)` whose layers hold the merged experts of `plan`.

    Args:
        model: a model, or its layers where they are found already.
        statistics: for methods of alignment and of merging that read sums, which those of this package do not, and for
            mean outputs in the place of pruned experts.
        consume: turn `model` itself into the result, freeing each layer's experts as it goes; otherwise it stays
            usable and unchanged, and the result shares no memory with it.
        progress: called as `progress(layer name, layers done, layers)`.
        sink: called as `sink(path, experts)` with what was merged, a layer at a time; layers that share their experts
            are handed over once.

    Raises:
        ValueError: a plan of another model or with an unknown method, or weights that are not finite; raised before
            anything is changed.
    """
    layers = Layers.of(model).uncompressed()
    check_weights(layers.source)
    before = replace(account(layers), bytes_on_disk=folder_bytes(layers.model.name_or_path))
    result = merge_layers(layers, plan, statistics=statistics, consume=consume, progress=progress, sink=sink)
    after = saved_costs(result)
    attach_record(result, replace(new_record(result, plan.to_dict()), costs={"before": before, "after": after}))
    return result


def merge_layers(
    layers: Layers,
    plan: MergePlan,
    *,
    statistics: RoutingStatistics | None = None,
    consume: bool = False,
    progress: Progress | None = None,
    sink: Sink | None = None,
) -> PreTrainedModel:
    """Do what `merge_experts` does to weights that were checked; the record is written once, when all else is done."""
    check_given(plan=(plan, MergePlan), statistics=(statistics, (RoutingStatistics, NoneType)))
    if sink is None:
        check_loaded(layers)
    check_plan(layers, plan, statistics)
    merged = {name: item for name, item in plan.layers.items() if not item.is_whole}
    layers = layers.only([layer for layer in layers if layer.name in merged])
    result, done = prepared(layers, consume=consume), 0
    for first, *others in layers.tied:
        sums = sums_of(statistics, [first, *others])
        experts = merge_layer(first, merged[first.name], result, plan, sums)
        if sink:
            sink(next(path for path, module in result.named_modules() if module is experts), experts)
        for layer in others:
            _tie(_install(layer, merged[layer.name], result, _router_of(plan)), experts)
        done += 1 + len(others)
        if progress:
            progress(first.name, done, len(merged))
    write_description(result, whole=[name for name in plan.layers if name not in merged])
    adopt_inner_models(result)
    _redispatch(result)
    register_family(type(result.config))
    return result


def check_loaded(layers: Layers) -> None:
    """Raise ValueError where the weights of a model stay in its folder, so that no result can be made in memory."""
    if isinstance(layers.source, Folder):
        raise ValueError(
            f"The weights of {layers.model.name_or_path} are read from its folder block by block: write the result to "
            "a folder as well, with merge_to_folder, or load the model."
        )


def check_plan(layers: Layers, plan: MergePlan, statistics: RoutingStatistics | None) -> None:
    """Raise ValueError where a plan is not of these layers, or its methods lack sums."""
    sizes = {layer.name: layer.num_experts for layer in layers}
    fits = all(len(item.expert_map) == sizes.get(name) for name, item in plan.layers.items())
    if not fits or layers.fingerprint != plan.fingerprint:
        raise ValueError("The plan was made for another model; make one with plan_merge for this one.")
    for layer in layers:
        if _router_of(plan) in (ZERO, CONSTANT):
            continue
        if layer.name in plan.layers and (kept := plan.layers[layer.name].kept) is not None:
            check_cut(layers.model, layer.name, layer.num_experts, kept)
    for shared in layers.tied:
        items = [plan.layers.get(layer.name) for layer in shared]
        if any(item != items[0] for item in items):
            names = ", ".join(layer.name for layer in shared)
            raise ValueError(f"The layers {names} share their experts; the plan must say the same of all of them.")
    _check_sums(plan, statistics)


def _check_sums(plan: MergePlan, statistics: RoutingStatistics | None) -> None:
    """Raise ValueError where the plan's methods read sums that are not there."""
    align, merge = _methods(plan)
    needs = [*ALIGNMENT.needs(align), *MERGING.needs(merge), *constant_needs(_router_of(plan))]
    if needs and statistics is None:
        raise ValueError(f"The plan's methods read {', '.join(needs)}: pass the statistics that it was made from.")
    if statistics is not None and statistics.fingerprint != plan.fingerprint:
        raise ValueError(
            "The statistics were taken from another model than the plan; pass those that it was made from."
        )
    for name in plan.layers if needs else ():
        cast(RoutingStatistics, statistics)[name].check(needs)


def _methods(plan: MergePlan) -> tuple[Callable[..., torch.Tensor | None], Callable[..., Expert]]:
    """Return how the plan aligns and merges."""
    return ALIGNMENT[plan.alignment or plan.config["alignment"]], MERGING[plan.merging or plan.config["merging"]]


def sums_of(statistics: RoutingStatistics | None, tied: list[MoELayer]) -> Sums:
    """Return the sums of layers that share their experts, empty ones without statistics."""
    return Sums() if statistics is None else statistics.together([layer.name for layer in tied])


def merge_layer(layer: MoELayer, item: LayerPlan, result: PreTrainedModel, plan: MergePlan, sums: Sums) -> nn.Module:
    """Read one layer, align and merge its experts group by group, and write them into `result`; returns them."""
    if layer.model is result:
        for module in layer.container.modules():
            detach(module, module)
    with layer.view(sums, plan.config["seed"]) as view:
        device = view.experts.expert(0)["down"].device  # the experts are open now, before others take their place
        experts = _install(layer, item, result, _router_of(plan))
        materialise(experts, device)
        fill_experts(experts, view, item, plan)
        if num_constants(experts):
            experts.approx_value.data.zero_()
        if _router_of(plan) == CONSTANT and num_constants(experts):
            experts.approx_value.data.copy_(mean_outputs(view)[_gone(item)])
    return experts


def _router_of(plan: MergePlan) -> str:
    """Return what becomes of routers: one of ROUTERS of merged layers, one of PRUNED_ROUTERS of pruned ones."""
    option, usual = ("pruned_router", SLICE) if plan.config.get("reduce") == "prune" else ("router", MAP)
    return plan.config.get(option, usual)


def _gone(item: LayerPlan) -> list[int]:
    """Return the experts that a pruning takes away, rising."""
    return [expert for expert, group in enumerate(item.expert_map) if group < 0]


def _install(layer: MoELayer, item: LayerPlan, result: PreTrainedModel, router: str) -> Any:
    """Give a layer of `result` its empty experts, and its router the map, or the rows that are left."""
    if item.kept is None or router in (ZERO, CONSTANT):
        return install_layer(result, layer.name, *_mapped(item, router))
    cut = _cut_tensors(layer) if router in MIXED or isinstance(layer.source, Folder) else {}
    with _router_tensors(layer, result, cut) as read:  # or they are cut where they are
        entries = {name: _entries(read[name], axis, layer.num_experts, item, router) for name, axis in cut.items()}
    experts = install_pruned(result, layer.name, layer.num_experts, item.kept)
    for name, values in entries.items():
        path, _, attribute = name.rpartition(".")
        set_tensor(result.get_submodule(path), attribute, values)
    return experts


def _mapped(item: LayerPlan, router: str) -> tuple[list[int], list[int]]:
    """Return the map of a layer whose router knows all experts, and which of them constants stand in for."""
    if item.kept is None:
        return list(item.expert_map), []
    gone, count = _gone(item), len(item.kept)
    places = {expert: count + (place if router == CONSTANT else 0) for place, expert in enumerate(gone)}
    return [places.get(expert, group) for expert, group in enumerate(item.expert_map)], gone


def described(item: LayerPlan, plan: MergePlan) -> dict[str, Any]:
    """Return what `config.mcsmoe` says of a layer that a plan has merged."""
    number = len(item.expert_map)
    if item.kept is not None and _router_of(plan) not in (ZERO, CONSTANT):
        return {"num_experts": number, "kept": item.kept}
    expert_map, gone = _mapped(item, _router_of(plan))
    return {"num_experts": number, "expert_map": expert_map, **({"approximate_experts": gone} if gone else {})}


@contextlib.contextmanager
def _router_tensors(
    layer: MoELayer, result: PreTrainedModel, names: Iterable[str]
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield tensors of a layer's router by their names in the model, from its folder or of `result`, still whole."""
    if isinstance(layer.source, Folder) and names:
        with layer.source.tensors(names) as read:
            yield read
    else:
        yield dict(chain(result.named_parameters(), result.named_buffers()))


def _entries(tensor: torch.Tensor, axis: int, num_experts: int, item: LayerPlan, router: str) -> torch.Tensor:
    """Return the entries along `axis` of the experts that stay, or the means of those of each group's members.

    What stands behind the experts' entries stays. Means are taken in float32 or higher.
    """
    kept = kept_entries(tensor, axis, num_experts, item.dominant)
    if router not in MIXED or not tensor.is_floating_point():
        return kept
    rows = tensor.detach().movedim(axis, 0).to(torch.promote_types(tensor.dtype, torch.float32))
    mixed = kept.movedim(axis, 0)  # of whose own the first are replaced
    for group in range(len(item.dominant)):
        members = item.members(group)
        shares = [item.weights[member] if router == "weighted" else 1 / len(members) for member in members]
        mixed[group] = sum(share * rows[member] for share, member in zip(shares, members, strict=True))
    return kept


def _cut_tensors(layer: MoELayer) -> dict[str, int]:
    """Return the names of the tensors of a layer's router that have an entry per expert, and its axis."""
    paths = {id(module): path for path, module in layer.model.named_modules()}
    found = cut_tensors(layer.model, layer.name, layer.num_experts)
    return {f"{paths[id(module)]}.{name}": axis for module, name, axis in found}


def fill_experts(experts: nn.Module, view: LayerView, item: LayerPlan, plan: MergePlan) -> None:
    """Align and merge the experts of a layer group by group, and write them into `experts`, G of the family's."""
    _, merge = _methods(plan)
    permutations, target = _alignments(view, item, plan), fused_views(experts)
    for group in range(len(item.dominant)):
        members = item.members(group)
        shares = [item.weights[member] for member in members]
        orders = [permutations.get(member) for member in members]
        target.set_expert(group, merge_group(merge, view, members, shares, orders))


def _tie(experts: nn.Module, source: nn.Module) -> None:
    """Let `experts` hold the parameters of `source`, as the two layers of the original did."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(experts, name, parameter)


def _alignments(view: LayerView, item: LayerPlan, plan: MergePlan) -> dict[int, torch.Tensor | None]:
    """Return a permutation int [F] per expert that has to be aligned, solved side by side.

    Experts alone in their group, references and members of weight 0 need none.
    """
    align, first = _methods(plan)[0], plan.config["reference"] == "first"
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
        return align(view, pair[1], pair[0])

    processes = current()
    with ThreadPoolExecutor(max_workers=_solvers(view.experts)) as pool:
        solved = list(pool.map(solve, processes.own(pairs.items())))
    return dict(zip(pairs, processes.joined(solved), strict=True))


def _solvers(weights: Experts) -> int:
    """Return how many assignments to solve side by side: one a core, while their matrices fit the memory of a layer.

    The solver releases the interpreter.
    """
    expert = weights.expert(0)
    layer_bytes = len(weights) * sum(tensor.nbytes for tensor in expert.values())
    return max(1, min(torch.get_num_threads(), layer_bytes // assignment_bytes(expert["up"].shape[0])))


def prepared(layers: Layers, *, consume: bool = False) -> PreTrainedModel:
    """Return a model of the generated class, in which the experts of `layers` are still to be merged.

    Blocks that the source holds beside it, which would keep their experts, are left out.
    """
    check_whole(layers.model, "a merge")
    extra = extra_blocks(layers.source)
    result = _prepare(layers, consume)
    remember_source(result, layers.model.name_or_path or "")
    convert_model(result)
    drop_blocks(result, extra)
    return result


def _prepare(layers: Layers, consume: bool) -> PreTrainedModel:
    """Return the model to be converted: that of `layers`, or a copy of all of it but the experts that will be merged.

    Accelerate's hooks are gone from it, but for those of experts of the model itself, which are still to be read.
    """
    experts = [parameter for layer in layers for _, parameter in layer.parameters]
    result = model = layers.model
    if not consume:
        empty = {id(old): nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad) for old in experts}
        result = copy.deepcopy(model, {**empty, **unhooked_copies(model)})
    if is_hooked(model):
        detach_all(model, result, {id(parameter) for parameter in experts})
        result.tie_weights()
    return result


def materialise(experts: nn.Module, device: torch.device) -> None:
    """Give experts that stand on the meta device memory on `device`."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.is_meta:
            memory = torch.empty_like(parameter, device=device)
            setattr(experts, name, nn.Parameter(memory, parameter.requires_grad))


def _redispatch(result: PreTrainedModel) -> None:
    """Spread the result over the devices of the original's map; if part of that was offloaded, all goes to the CPU."""
    device_map = vars(result).pop("hf_device_map", None)
    devices = {str(device) for device in (device_map or {}).values()}
    if devices & {"cpu", "disk"}:
        nn.Module.to(result, "cpu")
    elif len(devices) > 1:
        dispatch_model(result, device_map)
