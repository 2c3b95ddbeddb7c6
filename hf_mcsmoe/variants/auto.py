"""Registration with the Auto classes, where the package is installed. Does not travel: a checkpoint has `auto_map`."""

import importlib
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

import hf_mcsmoe.variants.merged_fairseq_moe_mcsmoe  # noqa: F401  (whose models can be merged from here on)
from hf_mcsmoe.variants.remote_mcsmoe import MODEL_TYPE, VariantConfig


class RegisteredVariantConfig(VariantConfig):
    """`VariantConfig` that makes the Auto classes know a family's generated classes when it first meets it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of the checkpoint's family and variant.

        Raises:
            ValueError: there is no such variant; see `VariantConfig.from_dict`.
        """
        answer = super().from_dict(config_dict, **kwargs)
        config = answer[0] if isinstance(answer, tuple) else answer
        name = config.variant["name"]
        if not (Path(__file__).parent / f"{name}_mcsmoe.py").is_file():
            raise ValueError(f"This version of hf_mcsmoe has no variant {name!r}: load with trust_remote_code=True.")
        module = importlib.import_module(f"hf_mcsmoe.variants.{name}_mcsmoe")
        for auto, path in config.auto_classes.items():
            auto_class = vars(modeling_auto).get(auto)
            if auto_class is not None and type(config) not in auto_class._model_mapping._extra_content:
                auto_class.register(type(config), module.__getattr__(path.partition(".")[2]))
        return answer


def register() -> None:
    """Let `AutoConfig` read checkpoints of variants."""
    AutoConfig.register(MODEL_TYPE, RegisteredVariantConfig, exist_ok=True)
