"""One layer in few bits: W_in, then the refit of W_out to what W_in has become, then W_out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import MEMORY_LIMIT
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.modeling.forward_mcsmoe import expert_hidden, low_rank_of
from hf_mcsmoe.quantization.codes import Codes, check_group_size, group_size_for
from hf_mcsmoe.quantization.compensation import COMPENSATED
from hf_mcsmoe.quantization.nearest import ROUNDING
from hf_mcsmoe.repair.fit import CHUNK, LayerFit
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig

# Share of an expert's second moment that is the mean of all experts'. Tried: 0.05 errs 2 to 4 % less than none, more
# so on text of other domains.
SHARED = 0.05
# One for all experts of a layer, or one for each.
Grids = Grid | Sequence[Grid]
# What an expert's matrix multiplies, some tokens at a time: [n, in].
States = Callable[[int], Iterable[torch.Tensor]]


@torch.no_grad()
def quantize_layer(
    layer: LayerFit,
    w_in: Grids | None,
    w_out: Grids | None,
    repair: RepairConfig | None = None,
    method: str | Callable = COMPENSATED,
) -> dict[str, list[Codes]]:
    """Round the weights of a layer's experts, in place, and return their codes by the weight's name and expert.

    W_in is rounded where the inputs that reach each expert, times their gates, feel it least; then the output matrices
    are refitted to the original layer, and rounded on the hidden units that are left. Of weights that are low rank +
    sparse, U, V and S are weights of their own, in groups that divide them.

    Args:
        w_in: grid of gate and up, or one for each expert; None leaves them as they are.
        w_out: grid of the output matrices.
        repair: how they are refitted; None for not at all. What trains all weights would undo the rounding: a closed
            form takes its place here.
        method: of `ROUNDING`.

    Raises:
        ValueError: see `nearest`; S in its training form.
    """
    rounding = Rounding(layer.experts, method)
    first, second = weight_names(layer.experts)
    codes: dict[str, list[Codes]] = {}
    if w_in is not None:
        codes |= rounding.weight(first, w_in, lambda expert: inputs_of(layer, expert))
    if w_out is not None:
        codes |= rounding.before_refit(second, w_out, lambda expert: hidden_of(layer, expert))
    if repair is not None:
        repair = _closed_form(layer, repair)
        REPAIR[repair.method](layer, repair)
    if w_out is not None:
        codes |= rounding.after_refit(second, w_out, lambda expert: hidden_of(layer, expert))
    return codes


def _closed_form(layer: LayerFit, repair: RepairConfig) -> RepairConfig:
    """Return a repair that leaves W_in alone. Outputs that a norm follows do not add up to one target."""
    method = "refit" if layer.experts.has_post_expert_norm else "joint"
    return replace(repair, method=method) if repair.method == "local" else repair


@torch.no_grad()
def round_experts(experts: Any, w_in: Grids | None, w_out: Grids | None) -> dict[str, list[Codes]]:
    """Round the weights of experts, in place, to the nearest codes, which are returned: without calibration data."""
    rounding = Rounding(experts)
    codes: dict[str, list[Codes]] = {}
    for name, grids in zip(weight_names(experts), (w_in, w_out), strict=True):
        codes |= {} if grids is None else rounding.weight(name, grids, None)
    return codes


def weight_names(experts: Any) -> tuple[str, str]:
    """Return what W_in and W_out are called in a container."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def inputs_of(layer: LayerFit, expert: int) -> Iterator[torch.Tensor]:
    """Yield the inputs of a stored expert times their gates, float32 [n, D]."""
    token, gates = layer.tokens_of(expert)
    for part in torch.arange(len(token)).split(CHUNK):
        states = layer.inputs.hidden[token[part]].to(layer.device)
        yield states.float() * gates[part].to(states.device).float()[:, None]


def hidden_of(layer: LayerFit, expert: int) -> Iterator[torch.Tensor]:
    """Yield the hidden units of a stored expert times their gates, float32 [n, F]."""
    token, gates = layer.tokens_of(expert)
    for part in torch.arange(len(token)).split(CHUNK):
        states = layer.inputs.hidden[token[part]].to(layer.device)
        hidden = expert_hidden(layer.experts, states, expert).float()
        yield hidden * gates[part].to(hidden)[:, None]


class Rounding:
    """Rounds weights of one container, dense or low rank + sparse, in place."""

    def __init__(self, experts: Any, method: str | Callable = COMPENSATED, memory_limit: int = MEMORY_LIMIT) -> None:
        """Take a container, a method of `ROUNDING`, and how many bytes second moments may take."""
        self.experts, self.method, self.memory_limit = experts, method, memory_limit

    def weight(self, name: str, grids: Grids, states: States | None) -> dict[str, list[Codes]]:
        """Round a weight, all parts of it, where `states` feel it least; return the codes by the parts' names."""
        return self.before_refit(name, grids, states) | self.after_refit(name, grids, states)

    def before_refit(self, name: str, grids: Grids, states: States | None) -> dict[str, list[Codes]]:
        """Round V of a weight that is low rank + sparse: a refit takes it as it is."""
        if name not in low_rank_of(self.experts):
            return {}
        return {f"{name}_v": self._part(self._stack(f"{name}_v"), grids, states)}

    def after_refit(self, name: str, grids: Grids, states: States | None) -> dict[str, list[Codes]]:
        """Round a dense weight, or U and S: what a refit changes of W_out."""
        if name not in low_rank_of(self.experts):
            return {name: self._rounded(self._stack(name), grids, states)}
        v, columns = self._stack(f"{name}_v"), name in self.experts.sparse_columns

        def inner(expert: int) -> Iterator[torch.Tensor]:
            yield from (part @ v[expert].float().T for part in states(expert))  # type: ignore[misc]

        return {
            f"{name}_u": self._part(self._stack(f"{name}_u"), grids, states and inner),
            # Kept columns of S lie as rows, whose inputs are the outputs of the matrix.
            f"{name}_s": self._part(self._kept(name), grids, None if columns else states),
        }

    def _stack(self, name: str) -> Sequence[torch.Tensor]:
        """Return views of each expert's part of a parameter, [out, in]."""
        values = getattr(self.experts, name).detach()
        is_turned = self.experts.is_transposed and name in weight_names(self.experts)
        return (values.mT if is_turned else values).unbind(0)

    def _kept(self, name: str) -> Sequence[torch.Tensor]:
        """Return views of the kept rows of each expert's S."""
        counts = self.experts.low_rank[name]["kept_rows"]
        if counts is None:
            raise ValueError(f"S of {name!r} is in its training form: `compact` the model first, then quantize it.")
        return getattr(self.experts, f"{name}_s").detach().split(counts)

    def _part(self, matrices: Sequence[torch.Tensor], grids: Grids, states: States | None) -> list[Codes]:
        """Round U, V or S, whose axes are not the model's, in groups that divide them."""
        width, own = matrices[0].shape[-1], [grids] if isinstance(grids, Grid) else grids
        fitting = [replace(grid, group_size=group_size_for(width, grid.group_size)) for grid in own]
        return self._rounded(matrices, fitting[0] if isinstance(grids, Grid) else fitting, states)

    def _rounded(self, matrices: Sequence[torch.Tensor], grids: Grids, states: States | None) -> list[Codes]:
        """Round matrices [out, in], one an expert, in place; return their codes."""
        own = [grids] * len(matrices) if isinstance(grids, Grid) else list(grids)
        width, count = matrices[0].shape[-1], len(matrices)
        codes: dict[int, Codes] = {}
        means: dict[int, torch.Tensor] = {}
        for grid, experts in self._batches(matrices, own):
            weights, moments = torch.stack([matrices[expert] for expert in experts]), None
            if states is not None:
                check_group_size(width, grid.group_size)
                size = self.block(width, grid.group_size)
                if len(experts) < count and size not in means:
                    means[size] = self._mean(width, size, count, states)
                moments = self._moments(width, size, experts, states, means.get(size))
            codes |= dict(zip(experts, ROUNDING[self.method](weights, moments, grid), strict=True))
        for expert, found in codes.items():
            matrices[expert].copy_(found.dequantized(matrices[expert].dtype))
        return [codes[expert] for expert in range(len(matrices))]

    def _batches(self, matrices: Sequence[torch.Tensor], grids: list[Grid]) -> Iterator[tuple[Grid, list[int]]]:
        """Yield experts of one grid and of one number of rows, as many as memory holds at a time."""
        alike: dict[tuple[Grid, int], list[int]] = {}
        for expert, (matrix, grid) in enumerate(zip(matrices, grids, strict=True)):
            alike.setdefault((grid, len(matrix)), []).append(expert)
        for (grid, rows), experts in alike.items():
            width = matrices[0].shape[-1]
            # Several copies of the moments in float64, and of the weights in float32.
            taken = 32 * width * self.block(width, grid.group_size) + 64 * rows * width
            size = max(1, self.memory_limit // taken)
            yield from ((grid, experts[start : start + size]) for start in range(0, len(experts), size))

    def block(self, width: int, group_size: int) -> int:
        """Return how many inputs one block of a second moment has: all of them, where memory holds that."""
        sizes = [size for size in range(group_size, width + 1, group_size) if width % size == 0]
        return max((size for size in sizes if 32 * width * size <= self.memory_limit), default=group_size)

    def _mean(self, width: int, size: int, count: int, states: States) -> torch.Tensor:
        """Return the mean second moment of all experts' tokens, float32 [blocks, B, B]: one expert at a time."""
        total, tokens = torch.zeros(width // size, size, size, device=self._device), 0
        for expert in range(count):
            tokens += _add_moments(total, states(expert))
        return total / max(tokens, 1)

    def _moments(
        self, width: int, size: int, experts: list[int], states: States, mean: torch.Tensor | None
    ) -> torch.Tensor:
        """Return second moments of experts' inputs, blocks of them along the diagonal, float32 [n, blocks, B, B].

        A share of each is the mean over the tokens of all: what an expert sees on other text, or if no token came.

        Args:
            size: B.
            mean: of all experts; None where these are all.
        """
        moments = torch.zeros(len(experts), width // size, size, size, device=self._device)
        counts = torch.tensor(
            [_add_moments(own, states(expert)) for own, expert in zip(moments, experts, strict=True)]
        )
        counts = counts.to(moments).view(-1, 1, 1, 1)
        mean = moments.sum(0) / counts.sum().clamp(min=1) if mean is None else mean
        return moments.mul_(1 - SHARED).add_(SHARED * counts.clamp(min=1) * mean)

    @property
    def _device(self) -> torch.device:
        return next(self.experts.parameters()).device


def _add_moments(moments: torch.Tensor, states: Iterable[torch.Tensor]) -> int:
    """Add second moments of states [n, in] to `moments` [blocks, B, B], in place; return how many there were."""
    count = 0
    for part in states:
        columns = part.unflatten(1, (-1, moments.shape[-1])).transpose(0, 1)  # [blocks, n, B]
        moments.baddbmm_(columns.mT, columns)
        count += len(part)
    return count
