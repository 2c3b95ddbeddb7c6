"""What a plain checkpoint would be of a compression that was not run yet: refused or told, from shapes alone."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.export.checkpoint import checked, plain_routers
from hf_mcsmoe.export.form import check_family, router_groups
from hf_mcsmoe.export.router_rows import ROUTER_ROWS, check_router_rows
from hf_mcsmoe.export.substituted import ENGINE
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.merge import described
from hf_mcsmoe.methods.budget import uniform_budget
from hf_mcsmoe.methods.config import SLICE, UNIFORM, MergeConfig
from hf_mcsmoe.modeling.convert import convert_model, write_description
from hf_mcsmoe.modeling.modeling_mcsmoe import install_described
from hf_mcsmoe.plan import LayerPlan, MergePlan
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import narrowed


@dataclass(frozen=True)
class Plain:
    """What a plain checkpoint is to be: the options of `export`, which describes them."""

    engines: tuple[str, ...] = ()
    router_rows: str = ROUTER_ROWS[0]
    expand: bool = False
    dense: bool = False
    mxfp4: bool = False

    @property
    def stores(self) -> dict[str, bool]:
        """How experts are stored."""
        return {"expand": self.expand, "dense": self.dense, "mxfp4": self.mxfp4}

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `export`."""
        return {"engines": self.engines, "router_rows": self.router_rows, **self.stores}


def check_plain(
    layers: Layers,
    config: MergeConfig,
    plain: Plain,
    *,
    low_rank: LoSparseConfig | None = None,
    quantization: QuantizationConfig | None = None,
    sparsity: SparsityConfig | None = None,
) -> int:
    """Check, before any forward and without weights, that `export` will take what a compression makes of layers.

    The result is put together from shapes alone and looked at as `export` looks at it. What a budget of one's own
    will answer is not known, and is taken to be alike for all layers.

    Args:
        layers: of the original, for which `check_options` found nothing to refuse.
        plain: the options of `export`.

    Returns:
        The bytes of the weights of the plain checkpoint.

    Raises:
        ValueError: see `export`.
    """
    check_family(layers)
    check_router_rows(plain.router_rows)
    _check_budget(layers, config, plain)
    layers = narrowed(layers, sparsity)
    chosen = layers.selected(config.skip)
    stored: dict[str, dict[str, Any]] = {layer.name: {} for layer in chosen}
    if low_rank:
        stored = {name: {"low_rank": {"down_proj": low_rank.to_dict()}} for name in stored}
    if quantization:
        for layer in chosen.selected(quantization.skip):
            stored[layer.name] |= {"quantized": _quantized(layer, quantization)}
    plan = _plan(chosen, config)
    form, kept, _ = checked(
        _Shapes(_compressed(layers.model, plan, stored)), plain.engines, **plain.stores, is_fitted=False
    )
    plain_routers(form, plain.router_rows, plan.to_dict())
    return kept.bytes


def _check_budget(layers: Layers, config: MergeConfig, plain: Plain) -> None:
    """Raise ValueError where layers would keep unlike numbers of experts, and a plain checkpoint has one for all."""
    has_room = plain.expand or (config.pruned_router != SLICE and list(plain.engines) == [ENGINE])
    is_whole = config.experts == (layers[0].num_experts if isinstance(config.experts, int) else 1.0)
    if isinstance(config.budget, str) and config.budget != UNIFORM and not has_room and not is_whole:
        raise ValueError(
            f"budget={config.budget!r} gives layers unlike numbers of experts, and a plain checkpoint has one for "
            f"all: choose budget={UNIFORM!r}."
        )


def _plan(chosen: Layers, config: MergeConfig) -> MergePlan:
    """Return a plan that leaves layers as many experts as one by statistics would, whichever these are."""
    has_counts, items = "counts" in config.needs, dict[str, LayerPlan]()
    for shared in chosen.tied:
        first = shared[0]
        groups = router_groups(first) if config.cuts_router or config.plain else 1
        counts = [1] * first.num_experts if has_counts else None
        items |= {layer.name: _item(first.num_experts, groups, counts, config) for layer in shared}
    told = ("reduce", "router", "pruned_router")
    return MergePlan(items, {"config": {name: vars(config)[name] for name in told}})


def _item(experts: int, groups: int, counts: list[int] | None, config: MergeConfig) -> LayerPlan:
    """Return the plan of a layer: the first experts stay, as many of each of the groups that its router picks among.

    Others merge with the last of them.
    """
    in_group, least = experts // groups, -(-config.least(experts) // groups)
    asked = config.experts / groups if isinstance(config.experts, int) else config.experts
    (left,) = uniform_budget([torch.ones(in_group)], int(asked) if isinstance(config.experts, int) else asked, least)
    left = max(1, min(left, in_group))
    dominant = [group * in_group + place for group in range(groups) for place in range(left)]
    if config.reduce == "prune":
        return LayerPlan.pruned(experts, dominant, counts)
    expert_map = [one // in_group * left + min(one % in_group, left - 1) for one in range(experts)]
    weights = [1 / expert_map.count(group) for group in expert_map]
    kept = dominant if config.cuts_router else None
    return LayerPlan(expert_map, dominant, weights, counts=counts, kept=kept)


def _quantized(layer: MoELayer, config: QuantizationConfig) -> dict[str, dict[str, Any]]:
    """Return what `config.mcsmoe` says of the matrices of a layer in few bits."""
    bits = config.bits if config.low_bits is None else [config.bits, config.low_bits]
    grids = {"gate_up_proj": config.grid(layer.hidden_size), "down_proj": config.grid(layer.intermediate_size)}
    return {
        name: {"bits": bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
        for name, grid in grids.items()
    }


def _compressed(original: PreTrainedModel, plan: MergePlan, stored: Mapping[str, dict[str, Any]]) -> PreTrainedModel:
    """Return an empty model, on the meta device, that a plan was done to; its configuration tells of `stored`."""
    with torch.device("meta"):
        model = cast(Any, type(original))._from_config(copy.deepcopy(original.config), dtype=original.dtype)
        convert_model(model)
        changed = {name: item for name, item in plan.layers.items() if not item.is_whole or stored[name]}
        entries = {name: _entry(item, plan) for name, item in changed.items()}
        install_described(model, entries)
    write_description(model, whole=[name for name in plan.layers if name not in changed])
    for name in changed:
        model.config.mcsmoe["layers"][name] |= stored[name]
    return model


def _entry(item: LayerPlan, plan: MergePlan) -> dict[str, Any]:
    """Return what `config.mcsmoe` says of a layer; one that is stored anew has the identity as its map."""
    if not item.is_whole:
        return described(item, plan)
    return {"num_experts": len(item.expert_map), "expert_map": list(range(len(item.expert_map)))}


class _Shapes(InMemory):
    """A model without weights, of which sizes alone are read."""

    def _check_present(self, module: nn.Module) -> None:
        """Take it as it is."""
