"""A compression as far as memory depends on it, from the options of one."""

from typing import Any

import torch

from hf_mcsmoe.forecast.needs import Run
from hf_mcsmoe.forecast.result import Result
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import STATISTICS

# Bytes of a number that is summed.
SUMMED = 8


def run_of(
    layers: Layers, result: Result, config: MergeConfig, *, repair: str = "none", stores: bool = False, **rows: Any
) -> Run:
    """Return the run that ends with `result`.

    Args:
        repair: its method.
        stores: whether experts are stored in few bits or as low rank + sparse afterwards.
        rows: the fields of `Run` about calibration rows.
    """
    groups = [shared[0] for shared in layers.tied]
    kept = {layer.name: layer.num_experts for layer in groups}
    kept |= {name: choice.experts for name, choice in result.choices.items()}
    merged = 0
    for layer in groups:
        size = sum(parameter.nbytes for _, parameter in layer.parameters)
        merged += size // layer.num_experts * kept[layer.name]
    return Run(
        result=result.bytes,
        merged=merged,
        kept=max(kept.values()),
        repair=repair,
        aligned=config.reduce == "merge" and config.alignment != "none",
        consume=repair == "none" and not stores,
        sums=_sums(layers, config),
        threads=torch.get_num_threads(),
        **rows,
    )


def _sums(layers: Layers, config: MergeConfig) -> int:
    """Return the bytes of the statistics that the methods read, of all layers."""
    total = 0
    for name in config.needs:
        axes = STATISTICS.find(name).axes or ""
        for layer in layers:
            count = 1
            for letter in axes:
                count *= layer.sizes[letter]
            total += count * SUMMED
    return total
