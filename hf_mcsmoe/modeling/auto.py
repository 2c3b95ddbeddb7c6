"""Registration with the Auto classes, where the package is installed. Does not travel: a checkpoint has `auto_map`."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_mcsmoe.modeling import modeling_mcsmoe
from hf_mcsmoe.modeling.configuration_mcsmoe import MCSMoEConfig


class RegisteredConfig(MCSMoEConfig):
    """`MCSMoEConfig` that registers a family's generated classes with the Auto classes when it first meets it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of the checkpoint's family, whose models the Auto classes now know.

        Raises:
            ValueError: see `MCSMoEConfig.from_dict` and `register_family`.
        """
        answer = super().from_dict(config_dict, **kwargs)
        register_family(type(answer[0] if isinstance(answer, tuple) else answer))
        return answer


def register_family(config_class: type[PreTrainedConfig]) -> None:
    """Make `AutoModel` and every head of the family of a generated configuration class know its generated classes.

    Raises:
        ValueError: the family is of a variant that this version does not know.
    """
    for name, path in config_class.auto_classes.items():
        auto_class = getattr(modeling_auto, name, None)
        if auto_class is not None and config_class not in auto_class._model_mapping._extra_content:
            model_class = getattr(modeling_mcsmoe, path.rpartition(".")[2], None)
            if model_class is None:
                raise ValueError(
                    f"This version of hf_mcsmoe merges no models of the variant {config_class.variant_name!r}: "
                    "upgrade it, or load with trust_remote_code=True in an environment without it."
                )
            auto_class.register(config_class, model_class, exist_ok=True)


def compression(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return what a model's configuration says of its compressed layers; None for a model that is not compressed."""
    return getattr(model.config, "mcsmoe", None)
