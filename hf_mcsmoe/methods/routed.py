"""What a statistic sees of one forward of a layer: tensors, never a module."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from hf_mcsmoe.methods.experts import Experts


@dataclass(frozen=True)
class Routed:
    """One forward of a layer: its tokens, what the router says of them, and what reaches which expert.

    `logits` [T, E] of the router; `hidden` [T, D] inputs of the experts; `index` int [T, K] picked experts, E for no
    expert; `weights` [T, K] of the picked experts' outputs, 0 where a pick reached none. A pick of E with a weight
    goes to an expert without weights (the identity), one of E with weight 0 was turned away by its expert's capacity.
    `scale` [T, K], mostly None, multiplies the inputs of the picks (Llama 4). `experts` are opened when touched, for
    the time of the statistic. Where the layer is merged, `index` counts stored experts, and E is their number but for
    `logits`.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    open_experts: Callable[[], Experts] = field(repr=False)
    scale: torch.Tensor | None = None

    @cached_property
    def experts(self) -> Experts:
        """The experts."""
        return self.open_experts()

    @property
    def reached(self) -> torch.Tensor:
        """Which picks reached an expert, bool [T, K]."""
        return (self.index < self.num_experts) & (self.weights != 0)

    @property
    def gates(self) -> torch.Tensor:
        """What the router says of each pick, [T, K], whether it multiplies the input or the output."""
        return self.weights if self.scale is None else self.weights * self.scale

    @property
    def turned_away(self) -> torch.Tensor:
        """Which tokens the capacity of their experts turned away, bool [T]."""
        return ((self.index == self.num_experts) & (self.weights == 0)).all(-1)

    def where(self, counted: torch.Tensor) -> "Routed":
        """Return the tokens for which `counted`, bool [T], is true."""
        tensors = {name: getattr(self, name) for name in ("logits", "hidden", "index", "weights", "scale")}
        chosen = {name: value[counted.to(value.device)] for name, value in tensors.items() if value is not None}
        return replace(self, **chosen)

    def outputs_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs [n, D] of an expert for the tokens that reach it, and their weights [n]."""
        token, pick = torch.where(self.reached & (self.index == expert))
        states = self.hidden[token]
        if self.scale is not None:
            states = states * self.scale[token, pick, None]
        return self.experts.output(expert, states), self.weights[token, pick]

    def per_input(self) -> "Routed":
        """Return the picks with one row for each input of an expert.

        That is a row per token, or where inputs are scaled one per pick, [T * K, 1], whose hidden states are scaled;
        a token's output is then the sum over its rows.
        """
        if self.scale is None:
            return self
        tokens, top_k = self.index.shape
        scaled = self.hidden[:, None, :] * self.scale[:, :, None]  # [T, K, D]
        return replace(
            self,
            logits=self.logits.repeat_interleave(top_k, 0),
            hidden=scaled.reshape(tokens * top_k, -1),
            index=self.index.reshape(-1, 1),
            weights=self.weights.reshape(-1, 1),
            scale=None,
        )
