"""Models with merged experts, for every family: classes generated on demand as `MCSMoE<BaseClass>`.

`MCSMoEMixtralForCausalLM` is a subclass of `MixtralForCausalLM` whose experts are shrunk after `__init__` as its
configuration says; module paths are the base class's. This file travels with every checkpoint: torch, transformers
and its siblings only.
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_mcsmoe import PREFIX, MCSMoEConfig, auto_map, config_class_for, convert_config
from .experts_mcsmoe import (
    INSTALLERS,
    MergedExperts,
    MergedJetMoeMoE,
    MergedSwitchSparseMLP,
    StackedExperts,
    install_merged_experts,
)
from .losparse_mcsmoe import LoSparseLinear, LowRankSparse, SparsePart, compact_rows, final_rows
from .saving_mcsmoe import SavedWhole

__all__ = ["LoSparseLinear", "MCSMoEConfig", "MCSMoEModel", "MergedSwitchSparseMLP", "convert_model", "merged_class"]


class MCSMoEModel(SavedWhole):
    """First base of every generated model class: shrinks the experts, and saves a folder that loads anywhere."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the base model for `config`, then give each merged layer its G empty experts."""
        _serve_generic_heads(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, layer in (config.mcsmoe or {"layers": {}})["layers"].items():
            experts = install_layer(self, name, layer["expert_map"])
            for weight, entry in layer.get("low_rank", {}).items():
                if weight not in experts.low_rank:  # installed by the base model inside a head
                    experts.install_low_rank(weight, entry["rank"], entry["kept_rows"])
        adopt_inner_models(self)
        self.init_weights()  # of the new experts, and their ties

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MergedExperts):
            init.copy_(module.expert_map, torch.tensor(module.expert_map_values, device=module.expert_map.device))
        if isinstance(module, LowRankSparse) and (module.low_rank or isinstance(module, StackedExperts)):
            module.init_low_rank(getattr(self.config.get_text_config(), "initializer_range", 0.02))
        else:
            super()._init_weights(module)

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


def _serve_generic_heads(config: Any) -> None:
    """Let `AutoModel.from_config(config)`, which the library's generic heads call, build the generated base model."""
    # Its presence would ask for `trust_remote_code`, whose answer does not reach that call. Saving writes it anew.
    vars(config).pop("auto_map", None)
    path = auto_map(config.base_model_type).get("AutoModel") if hasattr(config, "base_model_type") else None
    if path is not None and type(config) not in AutoModel._model_mapping:
        AutoModel.register(type(config), generated_class(path.rpartition(".")[2]), exist_ok=True)


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


def install_layer(model: nn.Module, name: str, expert_map: list[int]) -> MergedExperts:
    """Give layer `name` its G empty merged experts, re-classing experts of the experts interface."""
    path = layer_path(model, name)
    experts = model.get_submodule(path)
    if isinstance(experts, MergedExperts | MergedJetMoeMoE):  # by the base model inside a head
        return experts.experts if isinstance(experts, MergedJetMoeMoE) else experts
    if type(experts).__name__ not in INSTALLERS:
        experts.__class__ = merged_class(type(experts))
    return install_merged_experts(model, path, expert_map)


def merged_layers(model: nn.Module) -> Iterator[tuple[str, str, MergedExperts]]:
    """Yield the layers of merged experts: name in the configuration, path of the experts in the model, experts."""
    for name in model.config.mcsmoe["layers"]:
        path = layer_path(model, name)
        experts = model.get_submodule(path)
        if isinstance(experts, MergedJetMoeMoE):
            path, experts = f"{path}.experts", experts.experts
        yield name, path, experts


def adopt_inner_models(model: nn.Module) -> None:
    """Re-class the library models inside `model`, so that none is converted to the base family's file format."""
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and not isinstance(module, MCSMoEModel):
            module.__class__ = merged_class(type(module))


def convert_model(model: PreTrainedModel, layers: dict[str, dict]) -> None:
    """Turn a base model, in place, into the generated class; its layers are still to be installed.

    Args:
        layers: per experts container its `num_experts` (E) and `expert_map` (int [E] -> [G]).
    """
    target = merged_class(type(model))  # first, since it may refuse
    convert_config(model.config, layers)
    model.__class__ = target
    # Set by a load of the base model; a save would apply the reverse to the merged experts.
    vars(model).pop("_weight_conversions", None)


def merged_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the generated subclass `MCSMoE<base>` of a model or experts class of Transformers.

    Raises:
        ValueError: the class is not one of Transformers, so a checkpoint could not name it.
    """
    parts = base.__module__.split(".")
    if parts[:2] != ["transformers", "models"]:
        raise ValueError(
            f"{base.__name__} is defined in {base.__module__}, not in Transformers. A merged checkpoint of it could "
            "not be loaded elsewhere; only models of Transformers itself are supported."
        )
    exported = getattr(importlib.import_module("transformers"), base.__name__, None) is base
    return generated_class(PREFIX + base.__name__ + ("" if exported else "__" + "__".join(parts[2:])))


@cache
def generated_class(name: str) -> type[nn.Module]:
    """Return the class called `MCSMoE<Base>`, or `MCSMoE<Base>__<module>` where Transformers does not export `Base`.

    Raises:
        AttributeError: the name leads to no class of Transformers.
    """
    base_name, _, module = name.removeprefix(PREFIX).partition("__")
    source = "transformers.models." + module.replace("__", ".") if module else "transformers"
    base = getattr(importlib.import_module(source), base_name, None) if name.startswith(PREFIX) else None
    if not isinstance(base, type) or not issubclass(base, nn.Module):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fields: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"`{base.__name__}` with merged experts.",
    }
    if not issubclass(base, PreTrainedModel):
        return type(name, (MergedExperts, base), fields)
    # Named among the direct bases, or Auto classes would derive a further class, which could not be pickled.
    generation = (GenerationMixin,) if issubclass(base, GenerationMixin) else ()
    # Read off the source of a class's module, which for a generated class is this one.
    fields["_can_set_experts_implementation_cached_value"] = base._can_set_experts_implementation()
    if getattr(base.config_class, "model_type", None):
        with contextlib.suppress(ValueError):  # an inner model whose configuration is not registered by itself
            fields["config_class"] = config_class_for(base.config_class.model_type)
    cls = type(name, (MCSMoEModel, base, *generation), fields)
    # Done by `__init__` for the class that it builds. Without it `output_router_logits` and the like record nothing.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), base._can_record_outputs)
    return cls


def __getattr__(name: str) -> type[nn.Module]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated_class(name)
