"""Routing statistics: sums over the tokens of calibration data, additive over shards, saved as safetensors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_mcsmoe.files import replaced
from hf_mcsmoe.methods.view import Sums

FORMAT = "mcsmoe-statistics"
FORMAT_VERSION = 1


@dataclass
class RoutingStatistics:
    """Sums by the statistic's name, per layer, and the fingerprint of the model that they were taken from."""

    fingerprint: str
    layers: dict[str, Sums] = field(default_factory=dict)

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
        }
        with replaced(path) as new:
            save_file({key: value.contiguous() for key, value in tensors.items()}, new, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a file, of a later format, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} holds no routing statistics; make them with collect_statistics.")
                version = metadata.get("format_version", "1")
                if not version.isdecimal() or int(version) > FORMAT_VERSION:
                    raise ValueError(
                        f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade hf_mcsmoe "
                        "or collect the statistics anew."
                    )
                layers = {name: Sums() for name in json.loads(metadata["layers"])}
                for key in file.keys():  # noqa: SIM118
                    layer, _, name = key.rpartition("/")
                    layers[layer][name] = file.get_tensor(key)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}); delete it and collect the statistics anew."
            ) from None
        return cls(metadata["fingerprint"], layers)
