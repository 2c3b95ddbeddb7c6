"""What a merged layer and the original one give for the same tokens: rows for a fit, whole outputs, their distance."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.data.domains import MADE
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.constants_mcsmoe import constant_output, num_constants
from hf_mcsmoe.modeling.forward_mcsmoe import eager_experts_forward, expert_hidden, merge_picks, unstacked
from hf_mcsmoe.repair.least_squares import HELD_OUT, Rows, RowSource

# Tokens that go through an expert at a time.
CHUNK = 4096


@dataclass
class LayerFit:
    """One layer, or several that share their experts: merged `experts`, the `originals`, and the inputs of both.

    `original_inputs` are those of the original layer at the same tokens, with its experts as picks; `inputs`, what the
    merged experts see, with stored experts as picks, are otherwise the same unless the layers before have been changed
    too. `expert_map` int [E] -> [G] leads from the first picks to the second; None of a pruned layer, whose stored
    experts are some of the originals, and whose picks follow from a router of its own, or are of constants. `given` is
    the original layer's output, float32 [T, D] before any norm behind the experts, where somebody has computed it
    already. `sums` are statistics of the original layer, and `members` the original experts of each stored one, where
    something reads them.
    """

    name: str
    experts: Any
    originals: Experts
    inputs: LayerInputs
    original_inputs: LayerInputs
    expert_map: list[int] | None
    given: torch.Tensor | None = None
    sums: Sums = field(default_factory=Sums)
    members: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        stored = merge_picks(self.inputs.index, self.inputs.weights, self.experts.num_experts)
        self.picks, self.gates = stored  # int [T, K] stored expert or G, [T, K] summed weights
        numbers: torch.Tensor = self.inputs.domain.unique(return_inverse=True)[1]
        self.parts = numbers.masked_fill(self.inputs.held_out, HELD_OUT)  # int [T]: HELD_OUT or a data set
        self.constant = self._constant()

    def _constant(self) -> torch.Tensor:
        """Return what constants give in the place of experts, which no fit changes: [T, D], or 0 for none."""
        if not num_constants(self.experts):
            return torch.zeros(())
        values = self.experts.approx_value.detach().float().cpu()
        return constant_output(values, self.experts.num_experts, self.inputs.index, self.inputs.weights)

    def constant_of(self, token: torch.Tensor) -> torch.Tensor:
        """Return what constants give for some tokens int [n], [n, D], or 0 where there are none."""
        return self.constant[token] if self.constant.ndim else self.constant

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(self.experts.parameters()).device

    @property
    def calibrates(self) -> torch.Tensor:
        """Which tokens are of the calibration data and do not judge, bool [T]."""
        return ~self.inputs.held_out & (self.inputs.domain != MADE)

    def target(self) -> torch.Tensor:
        """Return the original layer's output, float32 [T, D] on the CPU, before any norm behind the experts."""
        if self.given is None:
            self.given = original_sum(self)
        return self.given

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens int [n] that a stored expert sees, and its summed weights [n]."""
        token, pick = torch.where(self.picks == expert)
        return token, self.gates[token, pick]

    def hidden(self, token: torch.Tensor, gates: torch.Tensor, expert: int) -> torch.Tensor:
        """Return what `output_weight` multiplies, [n, F]: the gated hidden states of a stored expert.

        Of low rank + sparse W_out, what V makes of them and those that S reads; biased experts have a column for the
        bias too.
        """
        states = self.inputs.hidden[token].to(self.device)
        hidden = expert_hidden(self.experts, states, expert).float()
        matrix = unstacked(self.experts)["down_proj"][expert]
        if not isinstance(matrix, torch.Tensor):
            hidden = torch.cat([hidden @ matrix.v.float().T, hidden[:, _read_units(matrix)]], 1)
        if self.experts.has_bias:
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        return hidden * gates.to(hidden)[:, None]


def original_sum(
    layer: LayerFit, members: list[int] | None = None, token: torch.Tensor | None = None, *, normed: bool = False
) -> torch.Tensor:
    """Return the original layer's gated sum over `members`, float32 [n, D] on the CPU.

    Args:
        members: experts of the original; None for all.
        token: int [n], the tokens; None for all.
        normed: whether a norm that follows the experts is applied.
    """
    inputs = layer.original_inputs
    token = torch.arange(len(inputs)) if token is None else token
    index, weights = inputs.index[token], inputs.weights[token].float()
    total = torch.zeros(len(token), inputs.hidden.shape[1])
    for member in range(len(layer.originals)) if members is None else members:
        rows, pick = torch.where((index == member) & (weights != 0))
        for part in torch.arange(len(rows)).split(CHUNK):
            states = inputs.hidden[token[rows[part]]].to(layer.device)
            output = layer.originals.output(member, states, normed=normed)
            total.index_add_(0, rows[part], output.float().cpu() * weights[rows[part], pick[part], None])
    return total


def output_weight(experts: Any, expert: int) -> torch.Tensor:
    """Return the output matrix of a stored expert, float64 [D, F], with the bias as a last column where it has one.

    Of low rank + sparse, U and the kept columns of S: with V as it is, the output is linear in them.
    """
    return torch.cat(_output_parts(experts, expert), 1).double()


def write_output_weight(experts: Any, expert: int, weight: torch.Tensor) -> None:
    """Store what `output_weight` reads."""
    matrix = unstacked(experts)["down_proj"][expert]
    parts = _output_parts(experts, expert)
    for part, values in zip(parts, weight.split([part.shape[1] for part in parts], 1), strict=True):
        part.copy_(values)
    if not isinstance(matrix, torch.Tensor) and matrix.kept is not None:
        matrix.s[matrix.kept] = parts[1].T  # which was a copy


def _output_parts(experts: Any, expert: int) -> list[torch.Tensor]:
    """Return the output matrix [D, F], or U and kept columns of S, and the bias [D, 1] where there is one.

    Views, but for columns chosen from S in its training form.
    """
    matrices = {name: weights[expert] for name, weights in unstacked(experts).items()}
    matrix = matrices["down_proj"]
    if isinstance(matrix, torch.Tensor):
        parts = [matrix.detach().T if experts.is_transposed else matrix.detach()]
    else:
        parts = [matrix.u.detach(), (matrix.s if matrix.kept is None else matrix.s[matrix.kept]).detach().T]
    return parts + ([matrices["down_proj_bias"].detach()[:, None]] if experts.has_bias else [])


def _read_units(matrix: Any) -> torch.Tensor:
    """Return the hidden units that S of a low rank + sparse W_out reads, as an index."""
    return matrix.rows if matrix.kept is None else matrix.kept


def expert_rows(layer: LayerFit, expert: int, targets: torch.Tensor) -> RowSource:
    """Return the source of what one stored expert is fitted to: `targets` [n, D] of the n tokens that it sees."""
    token, gates = layer.tokens_of(expert)

    def rows() -> Iterator[Rows]:
        for part in torch.arange(len(token)).split(CHUNK):
            hidden = layer.hidden(token[part], gates[part], expert)
            yield hidden, targets[part].to(hidden.device), layer.parts[token[part]].to(hidden.device)

    return rows


def merged_output(layer: LayerFit, experts: Any, token: torch.Tensor) -> torch.Tensor:
    """Return the output [n, D] of `experts`, the layer's own or others in their place, for some tokens int [n]."""
    states = layer.inputs.hidden[token].to(layer.device).float()
    picks, gates = layer.picks[token].to(layer.device), layer.gates[token].to(layer.device).float()
    return eager_experts_forward(experts, states, picks, gates) + layer.constant_of(token).to(states)


def layer_error(layer: LayerFit, experts: Any, target: torch.Tensor, token: torch.Tensor) -> float:
    """Return the squared error of the layer's output at some tokens int [n] against `target` [T, D]."""
    parts = token.split(CHUNK)
    return sum((merged_output(layer, experts, part).cpu() - target[part]).square().sum().item() for part in parts)
