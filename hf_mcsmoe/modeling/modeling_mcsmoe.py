"""Models with merged experts, for every family: classes generated on demand as `MCSMoE<BaseClass>`.

`MCSMoEMixtralForCausalLM` is a subclass of `MixtralForCausalLM` whose experts are shrunk after `__init__` as its
configuration says, and whose routers return stored experts; module paths are the base class's. This file travels with
every checkpoint: torch, transformers and its siblings only.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_mcsmoe import (
    PREFIX,
    MCSMoEConfig,
    check_layer,
    config_class_for,
    family_of,
)
from .constants_mcsmoe import stored_count
from .experts_mcsmoe import (
    OUTSIDE,
    MergedExperts,
    MergedJetMoeMoE,
    MergedSwitchSparseMLP,
    StackedExperts,
    install_experts,
    num_original,
)
from .forward_mcsmoe import IMPLEMENTATION, low_rank_of
from .generated_mcsmoe import known_class, known_name, model_class, serve_generic_heads
from .losparse_mcsmoe import LowRankSparse, SparsePart, check_rows, compact_rows, final_rows
from .pruned_mcsmoe import CUT, CutRouter, check_cut, cut_of, cut_router, joins_logits
from .quantized_mcsmoe import frozen_parameters, quantized_of, uncounted
from .router_mcsmoe import MAPPED, ExpertMap, MappedRouter, map_of, restore_maps, unmapped
from .saving_mcsmoe import SavedWhole

# The option of `from_pretrained` that takes weights of whatever shape.
ANY_SHAPE = "ignore_mismatched_sizes"

__all__ = ["MCSMoEConfig", "MCSMoEModel", "MergedSwitchSparseMLP", "merged_class"]


class MCSMoEModel(SavedWhole):
    """First base of every generated model class: shrinks the experts, and saves a folder that loads anywhere."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the base model for `config`, then give each merged layer its map and its G empty experts.

        Raises:
            ValueError: the configuration names what is no layer of experts, or one layer twice.
        """
        serve_generic_heads(config, generated_class)
        if not self._has_own_choice():
            prefer_ours(config, [None])
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        mcsmoe = config.mcsmoe or {"layers": {}}
        layers = mcsmoe["layers"]
        for name in mcsmoe.get("whole", []):
            layer_path(self, name)
        if len({layer_path(self, name) for name in layers}) < len(layers):
            raise ValueError(f"The configuration names a merged layer twice, with and without prefix: {list(layers)}.")
        install_described(self, layers)
        adopt_inner_models(self)
        self.init_weights()  # of the new experts, and their ties

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does; whatever that left in the maps, they hold their values.

        Raises:
            ValueError: weights of experts are missing or of another shape than the configuration says.
        """
        is_info_asked, is_any_shape = kwargs.pop("output_loading_info", False), kwargs.pop(ANY_SHAPE, False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs, **{ANY_SHAPE: True})
        if not is_any_shape:
            check_shapes(info["mismatched_keys"])
        check_experts(model, info["missing_keys"])
        restore_maps(model)
        for parameter in frozen_parameters(model):
            parameter.requires_grad_(False)  # a load lets scales be trained
        check_rows(model)
        return (model, info) if is_info_asked else model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters as the library does; quantized weights count as what they stand for."""
        more = 0 if only_trainable else uncounted(self)
        return super().num_parameters(only_trainable, exclude_embeddings) + more

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let all parameters be trained, or none; quantized weights never are."""
        frozen = {id(parameter) for parameter in frozen_parameters(self)}
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and id(parameter) not in frozen)
        return self

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return what is asked for, by default our implementation, which computes picks that meet once."""
        if requested_experts is None and not self._has_own_choice():
            requested_experts = IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)

    def _has_own_choice(self) -> bool:
        """Tell whether the family chooses another implementation than the library's default, for its accuracy."""
        choice = super().get_correct_experts_implementation(None)
        return self._can_set_experts_implementation() and choice != "grouped_mm"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ExpertMap):
            module.restore_map()
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        if isinstance(module, MergedExperts) and _is_own(module):
            module.init_low_rank(std)
            module.init_quantized(std)
            module.init_constants()
        elif isinstance(module, LowRankSparse) and module.low_rank:
            module.init_low_rank(std)
        else:
            super()._init_weights(module)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        # The family's plan says how to split its own experts; ours are whole on every process.
        whole = [
            path for path, module in self.named_modules() if isinstance(module, MergedExperts) and _is_own(module)
        ]
        expanded = super()._expand_parallel_plan(plan)
        return {name: style for name, style in expanded.items() if not f"{name}.".startswith(_prefixes(whole))}

    def _compact_state(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the state dictionary and `config.mcsmoe` with S in its compact form."""
        mcsmoe, state = copy.deepcopy(self.config.mcsmoe), dict(state)
        kept = final_rows(self, mcsmoe.get("keep"))
        for layer, path, _ in merged_layers(self):
            for name, entry in mcsmoe["layers"][layer].get("low_rank", {}).items():
                if entry["kept_rows"] is None:
                    part = SparsePart(state[f"{path}.{name}_s"], state.pop(f"{path}.{name}_kept"))
                    values, rows, counts = compact_rows(part, kept[f"{path}.{name}"])
                    state |= {f"{path}.{name}_s": values, f"{path}.{name}_rows": rows}
                    entry["kept_rows"] = counts
        return state, mcsmoe


def install_described(model: nn.Module, layers: dict[str, Any]) -> None:
    """Give a model the empty experts, and the routers, that a configuration describes by the layers' names."""
    for name, layer in layers.items():
        if "kept" in layer:
            experts = install_pruned(model, name, layer["num_experts"], layer["kept"])
        else:
            experts = install_layer(model, name, layer["expert_map"], layer.get("approximate_experts", ()))
        for weight, entry in layer.get("low_rank", {}).items():
            if weight not in low_rank_of(experts):  # else installed by the base model inside a head
                decomposable(experts).install_low_rank(weight, entry["rank"], entry["kept_rows"])
        for weight, entry in layer.get("quantized", {}).items():
            if weight not in quantized_of(experts):
                decomposable(experts).install_quantized(weight, entry)


def _is_own(experts: MergedExperts) -> bool:
    """Tell whether experts hold other weights than their library class does."""
    return bool(experts.low_rank or experts.quantized or experts.num_constants) or isinstance(experts, StackedExperts)


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise ValueError where weights, by name with their shapes in the checkpoint and in the model, differ."""
    if told := sorted(f"{name} is {list(stored)}, not {list(wanted)}" for name, stored, wanted in mismatched):
        raise ValueError(
            f"{len(told)} of the checkpoint's weights have another shape than its config.json says ({told[0]}): the "
            f"config.json was edited, take it from the original checkpoint; {ANY_SHAPE}=True makes them anew."
        )


def check_experts(model: nn.Module, missing: Iterable[str]) -> None:
    """Raise ValueError where some of the missing weights are those of experts, which would be random."""
    containers = [f"{path}." for path, module in model.named_modules() if path and _is_experts(module)]
    if lacking := sorted(name for name in missing if name.startswith(tuple(containers))):
        raise ValueError(
            f"The checkpoint lacks {len(lacking)} weights of experts that its config.json describes ({lacking[0]}): "
            "the config.json was edited, or files are missing; take both from the original checkpoint."
        )


def _prefixes(paths: list[str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in paths)


def prefer_ours(config: Any, instead_of: list[str | None]) -> None:
    """Choose our experts implementation in a configuration and its parts where they choose one of `instead_of`."""
    if config._experts_implementation in instead_of:
        config._experts_implementation_internal = IMPLEMENTATION
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            prefer_ours(part, instead_of)


def layer_path(model: nn.Module, name: str) -> str:
    """Return the path in `model` of the layer that the configuration calls `name`.

    A head's checkpoint may be loaded into the bare base model and the other way round, as Transformers allows.

    Raises:
        ValueError: the model has no such module.
    """
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    for path in (name, name.removeprefix(prefix), prefix + name):
        if path in modules:
            return path
    raise ValueError(
        f"{type(model).__name__} has no module {name!r}, which the checkpoint's configuration names as merged. "
        "The checkpoint belongs to another class, or to another version of Transformers."
    )


def install_layer(model: nn.Module, name: str, expert_map: list[int], approximate: Sequence[int] = ()) -> Any:
    """Give layer `name` its map and its G empty merged experts, which are returned.

    Args:
        approximate: the experts that the map sends to constants, for which the result has empty ones too.

    Raises:
        ValueError: the layer has no experts, or the map has not one entry for each of them.
    """
    path, experts = _experts_called(model, name)
    if map_of(model, path) is not None:  # installed by the base model inside a head
        return inner_experts(experts)
    told = {"expert_map": expert_map, "approximate_experts": list(approximate)}
    check_layer(name, {key: value for key, value in told.items() if value}, num_original(experts))
    count = stored_count(expert_map, approximate)
    experts = install_experts(model, path, expert_map, count)
    if approximate:
        decomposable(experts).install_constants(max(expert_map) + 1 - count)
    if map_of(model, path) is None:
        router = unmapped(model, path)
        router.__class__ = merged_class(type(router))
        # The map must hold its values also where the weights are yet to come.
        device = next(router.parameters()).device
        router.set_expert_map(expert_map, None if device.type == "meta" else device)
    return experts


def install_pruned(model: nn.Module, name: str, num_experts: int, kept: list[int]) -> Any:
    """Leave in layer `name` the experts `kept` of its E, empty ones, which are returned, and cut its router to them.

    Raises:
        ValueError: the layer has no experts, or another number of them; see `check_cut`.
    """
    path, experts = _experts_called(model, name)
    if cut_of(model, path) is not None:  # installed by the base model inside a head
        return inner_experts(experts)
    check_layer(name, {"num_experts": num_experts, "kept": kept}, num_original(experts))
    check_cut(model, path, num_experts, kept)
    experts = install_experts(model, path, list(range(len(kept))))
    router = cut_router(model, path, num_experts, kept)
    if joins_logits(router):
        router.__class__ = merged_class(type(router), CUT)
    return experts


def _experts_called(model: nn.Module, name: str) -> tuple[str, Any]:
    """Return the path and the container of the layer called `name`, of a class that computes by the interface.

    Raises:
        ValueError: the layer has no experts.
    """
    path = layer_path(model, name)
    experts = model.get_submodule(path)
    if not _is_experts(experts):
        raise ValueError(
            f"The configuration names {name!r} as merged, which in {type(model).__name__} is no experts but a "
            f"{type(experts).__name__}: the checkpoint is damaged or was edited."
        )
    is_inside = type(experts).__name__ in (*OUTSIDE, MergedJetMoeMoE.__name__) or hasattr(experts, "has_gate")
    if not is_inside:  # the interface's layout, outside the interface
        experts.__class__ = merged_class(type(experts))
    return path, experts


def _is_experts(container: Any) -> bool:
    """Tell whether a module, merged or not, is what the configuration calls a layer."""
    if type(container).__name__ in (*OUTSIDE, MergedJetMoeMoE.__name__):
        return True
    stored = low_rank_of(container) | quantized_of(container)
    stacked = hasattr(container, "down_proj") or "down_proj" in stored
    return stacked and hasattr(container, "num_experts")


def decomposable(experts: Any) -> Any:
    """Return experts, re-classed in place if they are the library's, whose weights can be factors or quantized.

    And behind which constants can stand.
    """
    # By name: a model loaded through remote code has a class of its own copy of this file.
    if all(cls.__name__ != MergedExperts.__name__ for cls in type(experts).__mro__):
        experts.__class__ = merged_class(type(experts))
    return experts


def inner_experts(container: Any) -> Any:
    """Return the merged experts of a container, which for JetMoE is the whole block."""
    return container.experts if "expert_map" in container._buffers else container


def merged_layers(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield the layers of merged experts: name in the configuration, path of the experts in the model, experts."""
    for name in model.config.mcsmoe["layers"]:
        path = layer_path(model, name)
        container = model.get_submodule(path)
        yield name, path if inner_experts(container) is container else f"{path}.experts", inner_experts(container)


def adopt_inner_models(model: nn.Module) -> None:
    """Re-class the library models inside `model`, so that none is converted to the base family's file format."""
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and not isinstance(module, MCSMoEModel):
            module.__class__ = merged_class(type(module))


def merged_class(base: type[nn.Module], kind: str = "") -> type[nn.Module]:
    """Return the generated subclass `MCSMoE<base>` of a model, router or experts class, be it of a file that travels.

    Args:
        kind: "Cut" for that of a router whose other experts are gone.

    Raises:
        ValueError: the class is not one of Transformers, nor known to `build_on`, so a checkpoint could not name it.
    """
    name = known_name(base)
    if name is None:
        raise ValueError(
            f"{base.__name__} is defined in {base.__module__}, not in Transformers. A merged checkpoint of it could "
            "not be loaded elsewhere; only models of Transformers itself are supported."
        )
    return generated_class(PREFIX + kind + name)


@cache
def generated_class(name: str) -> type[nn.Module]:
    """Return the class called `MCSMoE<Base>`, or `MCSMoE<Base>__<module>` where Transformers does not export `Base`.

    Raises:
        AttributeError: the name leads to no class that `known_class` finds.
    """
    own = name.removeprefix(PREFIX)
    is_cut = own.startswith(CUT)
    base = known_class(own.removeprefix(CUT)) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"`{base.__name__}` with merged experts.",
    }
    if is_cut:
        return type(name, (CutRouter, base), fields)
    if not issubclass(base, PreTrainedModel):
        mixin = MergedExperts if hasattr(base, "_apply_gate") else MAPPED.get(base.__name__, MappedRouter)
        return type(name, (mixin, base), fields)
    return model_class(name, MCSMoEModel, base, lambda config: config_class_for(*family_of(config)), fields)


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated_class(name)
