"""Routing statistics: sums over the tokens of calibration data, additive over shards, saved as safetensors."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "mcsmoe-statistics"
FORMAT_VERSION = 1


@dataclass
class LayerStatistics:
    """Sums over the counted tokens of one layer.

    `counts` int64 [E] tokens that reached each expert; `gate_sum` float64 [E] sum of their weights; `logit_gram`
    float64 [E, E] sum over tokens of `h h^T` for router logits `h` [E]; `tokens` int64 [] tokens seen. A token that
    the capacity of its expert turned away enters none of them.
    """

    counts: torch.Tensor
    gate_sum: torch.Tensor
    logit_gram: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def empty(cls, num_experts: int) -> "LayerStatistics":
        """Return the sums over no token."""
        zeros = torch.zeros(num_experts, dtype=torch.float64)
        gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        return cls(zeros.long(), zeros, gram, torch.zeros((), dtype=torch.long))

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    @property
    def frequency(self) -> torch.Tensor:
        """Share of the tokens that reached each expert, float64 [E]; zero where no token was seen."""
        return self.counts.double() / self.tokens.clamp(min=1)

    def update(
        self, logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """Add the tokens of one forward.

        Args:
            logits: router logits [T, E].
            index: picked experts int [T, K]; an index from E on is no expert, -1 that of a token over capacity.
            weights: their weights [T, K]; a pick of weight 0 reached no expert (skipped).
            mask: bool [T], the tokens that count; None for all.
        """
        counted = (index >= 0).all(-1)
        if mask is not None:
            counted &= mask.to(counted.device)
        logits, index, weights = logits[counted.to(logits.device)], index[counted], weights[counted.to(weights.device)]
        logits = logits.double()
        reached = (weights != 0) & (index < self.num_experts)
        picks = index[reached]
        counts = torch.bincount(picks, minlength=self.num_experts)
        gates = torch.zeros(self.num_experts, dtype=torch.float64, device=picks.device)
        self.counts = self.counts + counts.cpu()
        self.gate_sum = self.gate_sum + gates.index_add_(0, picks, weights[reached].double()).cpu()
        self.logit_gram = self.logit_gram + (logits.mT @ logits).cpu()
        self.tokens = self.tokens + len(logits)

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        return LayerStatistics(*(getattr(self, key) + getattr(other, key) for key in vars(self)))


@dataclass
class RoutingStatistics:
    """Statistics per layer name, and the fingerprint of the model that they were taken from."""

    fingerprint: str
    layers: dict[str, LayerStatistics] = field(default_factory=dict)

    def __getitem__(self, layer_name: str) -> LayerStatistics:
        return self.layers[layer_name]

    def __add__(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """Return the statistics of both shards of data together.

        Raises:
            ValueError: the two were taken from different models.
        """
        if self.fingerprint != other.fingerprint or self.layers.keys() != other.layers.keys():
            raise ValueError("The two statistics come from different models; only shards of one model can be added.")
        layers = {name: layer + other.layers[name] for name, layer in self.layers.items()}
        return RoutingStatistics(self.fingerprint, layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: tensors `<layer name>/<sum>`, the fingerprint among the metadata."""
        tensors = {f"{name}/{key}": value for name, layer in self.layers.items() for key, value in vars(layer).items()}
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self.fingerprint,
            "layers": json.dumps([*self.layers]),
        }
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)

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
                keys = LayerStatistics.__dataclass_fields__
                layers = {
                    name: LayerStatistics(**{key: file.get_tensor(f"{name}/{key}") for key in keys})
                    for name in json.loads(metadata["layers"])
                }
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}); collect the statistics anew."
            ) from None
        return cls(metadata["fingerprint"], layers)
