"""The closed form of a plain router: a ridge regression of its logits on its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_mcsmoe.export.form import PlainForm, Slots
from hf_mcsmoe.export.router_rows import BIAS
from hf_mcsmoe.export.write import State
from hf_mcsmoe.layers.batches import Batch, run_routed
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.routed import Routed

# Ridges that are tried, relative to the mean square of an input.
RIDGES = (1e-3, 1e-1, 10.0)
# So far, relatively, may logits be from the product of rows and inputs.
NEAR = 0.02


@dataclass
class RouterSums:
    """Sums over tokens of one layer: of inputs h (with a 1 behind them) and of wanted logits z, float64.

    The wanted logit of a group is the log of the mass of its members, `logsumexp` of their logits under the whole
    router: the plain router's softmax is then the merged one's, summed in each group.
    """

    slots: Slots
    inputs: torch.Tensor | None = None  # [D + 1, D + 1]
    wanted: torch.Tensor | None = None  # [D + 1, G]
    is_linear: bool = True
    rows: torch.Tensor | None = field(default=None, repr=False)  # of the whole router, with its bias, [E, D + 1]

    def add(self, routed: Routed, counted: torch.Tensor | None) -> None:
        """Take the tokens of one forward that count."""
        chosen = slice(None) if counted is None else counted.to(routed.logits.device)
        logits, hidden = routed.logits[chosen].double(), routed.hidden[chosen].double()
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], -1)
        if self.inputs is None:
            self.rows = _whole_rows(self.slots.layer)
            self.is_linear = self.rows is not None and _is_near(self.rows, hidden, logits)
        if self.is_linear:
            wanted = torch.stack([logits[:, members].logsumexp(-1) for members in self.slots.rows], -1)
            self.inputs = hidden.T @ hidden + (0 if self.inputs is None else self.inputs)
            self.wanted = hidden.T @ wanted + (0 if self.wanted is None else self.wanted)

    def solved(self, held: State, ridge: float) -> State:
        """Return the router's matrix, and its bias where it has one, drawn to what is held by a ridge."""
        path = self.slots.plain.router_rows
        if not self.is_linear or self.inputs is None or self.wanted is None or path not in held:
            return {}
        bias = f"{path.rpartition('.')[0]}.{BIAS}"
        has_bias = bias in held and held[bias].ndim == 1
        width = len(self.inputs) if has_bias else len(self.inputs) - 1
        inputs, wanted = self.inputs[:width, :width], self.wanted[:width]
        old = held[path].to(inputs)
        old = torch.cat([old, held[bias].to(inputs)[:, None]], 1) if has_bias else old
        scaled = inputs + ridge * inputs.diagonal().mean() * torch.eye(width, dtype=inputs.dtype, device=inputs.device)
        new = old + torch.linalg.solve(scaled, wanted - inputs @ old.T).T
        found = {path: new[:, : held[path].shape[1]].to(held[path])}
        return found | ({bias: new[:, -1].to(held[bias])} if has_bias else {})


def _is_near(rows: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    """Tell whether logits are the product of a router's rows and its inputs."""
    return rows.shape[1] == hidden.shape[1] and bool(
        (hidden @ rows.to(hidden).T - logits).norm() <= NEAR * logits.norm() + torch.finfo(torch.float32).eps
    )


def _whole_rows(layer: MoELayer) -> torch.Tensor | None:
    """Return the rows of a layer's router with its bias behind them, float64 [E, D + 1]; None where it has none."""
    path = layer.router_rows
    if path is None:
        return None
    owner, _, name = path.rpartition(".")
    with layer.source.loaded(owner) as module:
        held = {key: tensor.detach().double() for key, tensor in module.named_parameters()}
        bias = held.get(BIAS, held[name].new_zeros(len(held[name])))
        return torch.cat([held[name], bias[:, None]], 1) if len(bias) == len(held[name]) else None


def router_sums(form: PlainForm, batches: Sequence[Batch]) -> dict[str, RouterSums]:
    """Return the sums of each layer over batches, by its name: one pass of the merged model."""
    sums = {slot.layer.name: RouterSums(slot) for slot in form.slots}

    def take(layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        sums[layer.name].add(routed, counted)

    run_routed(form.layers, batches, take)
    return sums
