"""Registration with the Auto classes, where the package is installed. Does not travel: a checkpoint has `auto_map`."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_mcsmoe.modeling import modeling_mcsmoe
from hf_mcsmoe.modeling.configuration_mcsmoe import MCSMoEConfig, auto_map, config_class_for


class RegisteredConfig(MCSMoEConfig):
    """`MCSMoEConfig` that registers a family's generated classes with the Auto classes when it first meets it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of the checkpoint's family, whose models the Auto classes now know."""
        answer = super().from_dict(config_dict, **kwargs)
        register_family(config_dict["base_model_type"])
        return answer


def register_family(base_model_type: str) -> type[PreTrainedConfig]:
    """Make `AutoModel` and every head of the family know its generated classes; returns the configuration class."""
    config_class = config_class_for(base_model_type)
    for name, path in auto_map(base_model_type).items():
        auto_class = getattr(modeling_auto, name, None)
        if auto_class is not None and config_class not in auto_class._model_mapping._extra_content:
            model_class = getattr(modeling_mcsmoe, path.rpartition(".")[2])
            auto_class.register(config_class, model_class, exist_ok=True)
    return config_class


def compression(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return what a model's configuration says of its compressed layers; None for a model that is not compressed."""
    return getattr(model.config, "mcsmoe", None)
