"""Routing statistics: sums over the tokens of calibration data, additive over shards, saved as safetensors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.files import replaced
from hf_mcsmoe.methods.registry import Method
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import Sums

FORMAT = "mcsmoe-statistics"
FORMAT_VERSION = 1
DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass
class RoutingStatistics:
    """Sums by the statistic's name, per layer, and the fingerprint of the model that they were taken from.

    `data` is a hash of the batches, "" where nobody kept it. `curves` tell what choices for a layer cost, of layers
    that share experts under the first's name, and `conditions` with which options that was measured; mostly there are
    none.
    """

    fingerprint: str
    layers: dict[str, Sums] = field(default_factory=dict)
    curves: dict[str, LayerCurves] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    def __getitem__(self, layer_name: str) -> Sums:
        if layer_name not in self.layers:
            raise ValueError(
                f"There are no statistics of the layer {layer_name!r}, only of {', '.join(self.layers) or 'none'}: "
                "collect them with all layers of the model."
            )
        return self.layers[layer_name]

    def together(self, layer_names: Sequence[str]) -> Sums:
        """Return the sums of layers that share their experts, added."""
        return reduce(add, (self[name] for name in layer_names))

    def __add__(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """Return the statistics of both shards of data together.

        Raises:
            ValueError: the two were taken from different models, or hold different sums.
        """
        if self.fingerprint != other.fingerprint or self.layers.keys() != other.layers.keys():
            raise ValueError("The two statistics come from different models; only shards of one model can be added.")
        layers = {name: layer + other.layers[name] for name, layer in self.layers.items()}
        return RoutingStatistics(self.fingerprint, layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: tensors `<layer name>/<statistic>`, the fingerprint among the metadata.

        It is written whole or not at all.
        """
        tensors = {f"{name}/{key}": value for name, layer in self.layers.items() for key, value in layer.items()}
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self.fingerprint,
            "layers": json.dumps([*self.layers]),
            "data": self.data,
        }
        if self.curves:
            metadata["curves"] = json.dumps({name: curves.to_dict() for name, curves in self.curves.items()})
            metadata["conditions"] = json.dumps(self.conditions)
        with replaced(path) as new:
            save_file({key: value.contiguous() for key, value in tensors.items()}, new, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a file, of a later format, or damaged.
        """
        metadata, tensors = _read_file(path)
        try:
            layers: dict[str, Sums] = {name: Sums() for name in json.loads(metadata["layers"])}
            for key, value in tensors.items():
                layer, _, name = key.rpartition("/")
                layers[layer][name] = value
            told = json.loads(metadata.get("curves", "{}"))
            curves = {name: LayerCurves.from_dict(values) for name, values in told.items()}
            measured_with = dict(json.loads(metadata.get("conditions", "{}")))
            statistics = cls(metadata["fingerprint"], layers, curves, measured_with, metadata.get("data", ""))
            statistics.check()
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and collect the statistics anew.") from None
        return statistics

    def check(self, sizes: Mapping[str, Mapping[str, int]] | None = None) -> None:
        """Check that all sums are of known statistics, and could have been summed by them.

        Args:
            sizes: of each layer, by the letters of their axes, as in `Method.axes`; None takes E from the sums.

        Raises:
            ValueError: an unknown statistic, a sum of another shape, NaN, a number below 0 where none can be, or an
                expert that more tokens reached than there were.
        """
        for name, curves in self.curves.items():
            if name not in self.layers or (sizes and name in sizes and sizes[name]["E"] != curves.experts):
                raise ValueError(
                    f"the curves of {name} are of {curves.experts} experts, and of no layer that there is."
                )
        for name, sums in self.layers.items():
            known = sizes[name] if sizes is not None and name in sizes else _sizes(sums)
            for key, value in sums.items():
                _check_sum(f"{key} of {name}", STATISTICS.find(key), value, known)
            if {"counts", "tokens"} <= sums.keys() and (sums.counts > sums.tokens).any():
                raise ValueError(
                    f"counts of {name} say that {int(sums.counts.max())} tokens reached an expert, of "
                    f"{int(sums.tokens)} in all."
                )


def _read_file(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return metadata and tensors of a file of statistics.

    Raises:
        ValueError: it is no safetensors file, of something else, or of a later format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if metadata.get("format") == FORMAT else []  # not all of a model's weights
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); delete it and collect the statistics anew."
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no routing statistics; make them with collect_statistics.")
    version = metadata.get("format_version", "1")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade hf_mcsmoe or collect "
            "the statistics anew."
        )
    return metadata, tensors


def _sizes(sums: Sums) -> dict[str, int]:
    """Return E, from the first of the sums that has such an axis."""
    axes = {name: STATISTICS.methods[name].axes for name in sums if name in STATISTICS.methods}
    return next(({"E": len(sums[name])} for name, letters in axes.items() if letters and sums[name].ndim), {})


def _check_sum(name: str, method: Method, value: torch.Tensor, sizes: Mapping[str, int]) -> None:
    if not value.isfinite().all():
        raise ValueError(f"{name} is not finite: the model holds NaN or overflows.")
    axes = method.axes
    if axes is None:
        return
    shape = tuple(sizes.get(letter, 0) for letter in axes)
    if len(shape) != value.ndim or any(size and size != found for size, found in zip(shape, value.shape, strict=True)):
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, and should be [{', '.join(axes)}] of {sizes}.")
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} is of {value.dtype}, in which nothing is summed.")
    if not method.signed and value.numel() and value.min() < 0:
        raise ValueError(f"{name} holds {float(value.min())}, and is never negative.")
