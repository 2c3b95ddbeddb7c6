"""Routing statistics of one layer: sums over the tokens of calibration data."""

from dataclasses import dataclass

import torch


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
