"""Configuration of a model with merged experts. This file travels with every checkpoint: no import of the package."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

PREFIX = "MCSMoE"
FORMAT_VERSION = 1


@cache
def auto_map(base_model_type: str) -> dict[str, str]:
    """Return the `auto_map` entry of `config.json`: for each Auto class that serves the base family, our class.

    Heads that are built from a part of the configuration (the text model of a multimodal family) are left out.
    """
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    entries = {"AutoConfig": f"configuration_mcsmoe.{PREFIX}Config"}
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and base_model_type in mapping._model_mapping:
            base = mapping[CONFIG_MAPPING[base_model_type]]
            base = base[0] if isinstance(base, tuple | list) else base
            if base.config_class is CONFIG_MAPPING[base_model_type]:
                entries[name] = f"modeling_mcsmoe.{PREFIX}{base.__name__}"
    return entries


class MergedConfigMixin:
    """What a family's configuration gains: the family's name and the merged layers.

    `mcsmoe["layers"][name]` holds `num_experts` (E, the experts that the router knows) and `expert_map`
    (int [E] -> [G], from the router's index to the stored expert) of the experts container called `name`.
    """

    model_type = "mcsmoe"
    base_model_type: str | None = None
    mcsmoe: dict | None = None
    # Made with the class: some models call `to_dict` in their forward, where a compiler cannot follow imports.
    auto_classes: ClassVar[dict[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields of the base family's configuration and ours, ready for `config.json`."""
        output = super().to_dict()
        output["auto_map"] = dict(self.auto_classes)
        return output


class MCSMoEConfig(MergedConfigMixin, PreTrainedConfig):
    """Entry point of `AutoConfig`: reads `base_model_type` and answers with that family's generated configuration."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of `config_dict["base_model_type"]` with merged experts.

        Raises:
            ValueError: the dictionary names no base family, one that the installed Transformers lacks, or a format
                that this file is too old to read.
        """
        version = (config_dict.get("mcsmoe") or {}).get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format {version}; this code reads up to {FORMAT_VERSION}. Upgrade hf_mcsmoe, or "
                "load with trust_remote_code=True in an environment without it."
            )
        return config_class_for(config_dict.get("base_model_type")).from_dict(config_dict, **kwargs)


def config_class_for(base_model_type: str | None) -> type[PreTrainedConfig]:
    """Return the generated configuration class of a family, e.g. `MCSMoEMixtralConfig` for "mixtral".

    Raises:
        ValueError: the installed Transformers does not know the family.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"AutoConfig of this Transformers knows no model type {base_model_type!r}, so a merged model of it "
            "could not be loaded. Upgrade transformers, or compress the whole model that this one is a part of."
        )
    base = CONFIG_MAPPING[base_model_type]
    return generated_config_class(PREFIX + base.__name__)


@cache
def generated_config_class(name: str) -> type[PreTrainedConfig]:
    """Return the class called `MCSMoE<BaseConfig>`: the base configuration with `model_type` "mcsmoe".

    Raises:
        AttributeError: `name` does not name a configuration class of Transformers.
    """
    base = getattr(importlib.import_module("transformers"), name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or not isinstance(base, type) or not issubclass(base, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    fields = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` of a model whose experts were merged.",
        "__annotations__": {"base_model_type": str | None, "mcsmoe": dict | None},
        "base_model_type": base.model_type,
        "auto_classes": auto_map(base.model_type),
        "mcsmoe": None,
        "model_type": "mcsmoe",
    }
    return type(name, (MergedConfigMixin, base), fields)


def convert_config(config: PreTrainedConfig, layers: dict[str, dict]) -> None:
    """Turn the configuration object of a base model, in place, into that of the model with merged `layers`."""
    base_model_type = type(config).model_type
    config.__class__ = config_class_for(base_model_type)
    # An instance attribute would win over the class: the base's name would then choose the base's weight conversions.
    for stale in ("model_type", "auto_map", "architectures"):
        vars(config).pop(stale, None)
    config.base_model_type = base_model_type
    config.mcsmoe = {"format_version": FORMAT_VERSION, "layers": layers}


def source_files() -> list[Path]:
    """Return the files that must lie beside a checkpoint so that it loads without the package."""
    return sorted(Path(__file__).parent.glob("*_mcsmoe.py"))


def __getattr__(name: str) -> type[PreTrainedConfig]:
    return generated_config_class(name)
