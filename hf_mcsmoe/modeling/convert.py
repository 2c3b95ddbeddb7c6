"""Turning a library model into one with merged experts, where the package is installed. Does not travel."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.modeling.configuration_mcsmoe import config_class_for
from hf_mcsmoe.modeling.modeling_mcsmoe import describe, merged_class, prefer_ours


def convert_model(model: PreTrainedModel) -> None:
    """Turn a base model, in place, into the generated class; its layers are still to be installed, and described."""
    target = merged_class(type(model))  # first, since it may refuse
    _convert_config(model.config)
    prefer_ours(model.config, [None, "grouped_mm"])  # the library's own choice where the user made none
    model.__class__ = target
    # Set by a load of the base model; a save would apply the reverse to the merged experts.
    vars(model).pop("_weight_conversions", None)
    write_description(model)


def _convert_config(config: PreTrainedConfig) -> None:
    """Turn the configuration object of a base model, in place, into that of a merged model."""
    base_model_type = type(config).model_type
    config.__class__ = config_class_for(base_model_type)
    # An instance attribute would win over the class: the base's name would then choose the base's weight conversions.
    for stale in ("model_type", "auto_map", "architectures"):
        vars(config).pop(stale, None)
    config.base_model_type = base_model_type


def write_description(model: nn.Module, *, keep: float | None = None, whole: Sequence[str] | None = None) -> None:
    """Let `config.mcsmoe` say what the model's modules hold; nothing else writes it.

    Args:
        keep: share of the rows of S that is to be left; None leaves what the configuration says.
        whole: names of the layers of which all experts were kept; None leaves what the configuration says.
    """
    given = {"keep": keep, "whole": None if whole is None else list(whole)}
    model.config.mcsmoe = describe(model) | {key: value for key, value in given.items() if value is not None}
