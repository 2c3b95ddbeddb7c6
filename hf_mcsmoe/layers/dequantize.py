"""Checkpoints of quantized weights: refused, or read as the weights that these stand for."""

import inspect
import math
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

# Our way of reading FP8, by the name under which Transformers finds it.
RAGGED_FP8 = "mcsmoe_fp8"
OTHER_WAY = "compress the checkpoint that it was quantized from, and quantize the result."


class RaggedFp8Dequantize(Fp8Dequantize):
    """Dequantize blocks of FP8, of which the last of a row or column may be cut off.

    The library divides rows and columns by the number of scales, which moves the blocks of such a matrix, or fails.
    """

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if block is None or scales.ndim < 2 or not quantized.is_floating_point():
            return super()._dequantize_one(quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        count = math.ceil(rows / block[0]), math.ceil(columns / block[1])
        if tuple(scales.shape[-2:]) != count:  # blocks of another size, which the library reads off the scales
            return super()._dequantize_one(quantized, scales, output_dtype)
        missing = (0, count[1] * block[1] - columns, 0, count[0] * block[0] - rows)
        whole = nn.functional.pad(quantized.to(torch.float32), missing)
        return super()._dequantize_one(whole, scales, output_dtype)[..., :rows, :columns].contiguous()


@register_quantizer(RAGGED_FP8)
class RaggedFp8Quantizer(FineGrainedFP8HfQuantizer):
    """The library's, with `RaggedFp8Dequantize`."""

    def get_load_operations(self) -> dict[str, Any]:
        """Return what reads the stored tensors."""
        return {"dequantize": RaggedFp8Dequantize}


register_quantization_config(RAGGED_FP8)(FineGrainedFP8Config)


def check_not_quantized(config: PreTrainedConfig | None, name: str) -> None:
    """Raise ValueError where a configuration says that the weights of `name`, a model or a folder, are quantized."""
    if (method := quantization_method(config)) is None:
        return
    told = f"{name} is quantized ({method}), and packed weights cannot be merged."
    if not _is_dequantized_on_load(method):
        raise ValueError(f"{told} Transformers does not dequantize {method}: {OTHER_WAY}")
    raise ValueError(
        f"{told} Load it dequantized: --dequantize on the command line, in Python load_model(path, dequantize=True) "
        "of hf_mcsmoe.layers.loading, or Folder(path, dequantize=True). Quantize the result if you like."
    )


def quantization_method(config: PreTrainedConfig | None) -> str | None:
    """Return the name of the method by which weights are quantized; None where they are not."""
    settings = _settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def quantization_settings(config: PreTrainedConfig | None) -> dict[str, Any]:
    """Return what a configuration says of how weights are quantized; nothing where they are not."""
    settings = _settings(config)
    return {} if settings is None else dict(settings if isinstance(settings, dict) else settings.to_dict())


def _settings(config: PreTrainedConfig | None) -> Any:
    if config is None:
        return None
    own = getattr(config, "quantization_config", None)
    return own if own is not None else getattr(config.get_text_config(), "quantization_config", None)


def _is_dequantized_on_load(method: str) -> bool:
    settings = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    return settings is not None and "dequantize" in inspect.signature(settings).parameters


def dequantized(config: PreTrainedConfig, name: str) -> Any:
    """Take the quantization out of a configuration, in place; returns Transformers' quantizer that reads `name`.

    Returns None where nothing is quantized.

    Raises:
        ValueError: Transformers does not dequantize weights of this method, or lacks a package that it needs for it.
    """
    if (method := quantization_method(config)) is None:
        return None
    if not _is_dequantized_on_load(method):
        raise ValueError(f"{name} is quantized ({method}), and Transformers does not dequantize {method}: {OTHER_WAY}")
    settings = {**_settings(config), "dequantize": True}
    if method == "fp8":
        settings["quant_method"] = RAGGED_FP8
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    try:
        made = AutoQuantizationConfig.from_dict(settings)
        return AutoHfQuantizer.from_config(made, pre_quantized=True)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} is quantized ({method}), and cannot be dequantized: {error}") from None


def saved_plainly(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model that was loaded dequantized be saved in its family's format; returns it."""
    cast(Any, model)._weight_conversions = get_model_conversion_mapping(model)
    return model
