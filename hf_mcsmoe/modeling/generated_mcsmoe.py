"""Classes made of those of Transformers, and found again by their names. This file travels with every checkpoint.

A module that makes such classes answers for their names in its `__getattr__`, so that pickles, Auto classes and
checkpoints find them in any process.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

# Full names of modules, beside this one or in another room, whose classes models are built on, by the last part.
BUILT_ON: dict[str, str] = {}


def build_on(*classes: type) -> None:
    """Let `known_class` find these classes, and all others of their modules, which travel with checkpoints."""
    BUILT_ON.update({cls.__module__.rpartition(".")[2]: cls.__module__ for cls in classes})


def known_name(base: type[nn.Module]) -> str | None:
    """Return the name by which `known_class` finds a class; None where a checkpoint could not name it.

    It is that of `library_name`, or the class's with `__<file>` where it is of a file given to `build_on`.
    """
    file = base.__module__.rpartition(".")[2]
    return f"{base.__name__}__{file}" if BUILT_ON.get(file) == base.__module__ else library_name(base)


def known_class(name: str) -> type[nn.Module] | None:
    """Return the class that `known_name` gave this name, or None where there is none."""
    own, _, file = name.rpartition("__")
    if file not in BUILT_ON:
        return library_class(name)
    return _model_part(getattr(importlib.import_module(BUILT_ON[file]), own, None))


def library_name(base: type[nn.Module]) -> str | None:
    """Return the name by which `library_class` finds a class, or None where it is not one of Transformers' own.

    It is the class's, followed by `__<module>` where Transformers does not export it.
    """
    parts = base.__module__.split(".")
    if parts[:2] != ["transformers", "models"]:
        return None
    exported = getattr(importlib.import_module("transformers"), base.__name__, None) is base
    return base.__name__ + ("" if exported else "__" + "__".join(parts[2:]))


def library_class(name: str) -> type[nn.Module] | None:
    """Return the class of Transformers that `library_name` gave this name, or None where there is none."""
    own, _, module = name.partition("__")
    source = "transformers.models." + module.replace("__", ".") if module else "transformers"
    try:
        base = getattr(importlib.import_module(source), own, None)
    except ModuleNotFoundError as error:
        if not source.startswith(str(error.name)):
            raise
        return None  # a name that is none of ours, or of a module that another version has
    return _model_part(base)


def _model_part(found: Any) -> type[nn.Module] | None:
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def model_class(
    name: str,
    mixin: type,
    base: type[PreTrainedModel],
    config_class: Callable[[type[PreTrainedConfig]], type[PreTrainedConfig]],
    fields: dict[str, Any],
) -> type[Any]:
    """Make the class of a model: a mixin before a class of Transformers.

    Args:
        config_class: called with the base's own; where it raises ValueError that stays.
        fields: of the class, `__module__` among them.
    """
    # Named among the direct bases, or Auto classes would derive a further class, which could not be pickled.
    generation = (GenerationMixin,) if issubclass(base, GenerationMixin) else ()
    # Read off the source of a class's module, which for a generated class is ours.
    fields = {"_can_set_experts_implementation_cached_value": base._can_set_experts_implementation(), **fields}
    if getattr(base.config_class, "model_type", None):
        with contextlib.suppress(ValueError):  # an inner model whose configuration is not registered by itself
            fields["config_class"] = config_class(base.config_class)
    cls = type(name, (mixin, base, *generation), fields)
    # Done by `__init__` for the class that it builds. Without it `output_router_logits` and the like record nothing.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), base._can_record_outputs)
    return cls


def serve_generic_heads(config: Any, made: Callable[[str], type[Any]]) -> None:
    """Let `AutoModel.from_config(config)`, which the library's generic heads call, build the generated base model.

    Args:
        made: returns the class of a name.
    """
    # Its presence would ask for `trust_remote_code`, whose answer does not reach that call. Saving writes it anew.
    vars(config).pop("auto_map", None)
    path = vars(type(config)).get("auto_classes", {}).get("AutoModel")
    if path is not None and type(config) not in AutoModel._model_mapping:
        AutoModel.register(type(config), made(path.rpartition(".")[2]), exist_ok=True)
