"""Least squares for all output matrices of a layer at once: what its stored experts give together is its output.

The unknown is one matrix [D, N], the output matrices of the G experts side by side, N the sum of their widths. It
multiplies the gated hidden units of all of them, of which a token has those of its picks and else zeros.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_mcsmoe.repair.fit import CHUNK, LayerFit, output_weight
from hf_mcsmoe.repair.least_squares import HELD_OUT, best_ridge, conjugate_gradients, folds_of

# Tokens that see an expert, int [n], and its gated hidden units there [n, F].
Seen = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class JointFit:
    """What became of the output matrices of a layer: `weights`, float64 [D, F] each, as `output_weight` reads them.

    `ridge` that was chosen, None where all stayed as they were; `before`, `after` and `energy`, squared errors of the
    layer's output on held-out tokens, and the squared norm of their targets. `after` is that of a fit without these
    tokens, which the weights then include.
    """

    weights: list[torch.Tensor]
    ridge: float | None
    before: float
    after: float
    energy: float


class Units:
    """The gated hidden units of a layer's stored experts, [n, F] of each for the n tokens that it sees.

    Kept where they fit into half of `memory_limit` bytes, else computed anew each time that they are read.
    """

    def __init__(self, layer: LayerFit, memory_limit: int) -> None:
        """Compute them, or only note what they are made of."""
        self.layer, self.memory_limit = layer, memory_limit
        experts = range(layer.experts.num_experts)
        self.seen = [layer.tokens_of(expert) for expert in experts]
        starts = [output_weight(layer.experts, expert) for expert in experts]
        self.widths = [start.shape[1] for start in starts]
        self.start = torch.cat(starts, 1)  # float64 [D, N]
        sizes = [len(token) * width for (token, _), width in zip(self.seen, self.widths, strict=True)]
        self.fits = 4 * sum(sizes) <= memory_limit // 2
        self.kept = [_joined(self._computed(expert), self.widths[expert]) for expert in experts] if self.fits else []

    @property
    def are_apart(self) -> bool:
        """Whether no token sees two of the experts."""
        tokens = torch.cat([token for token, _ in self.seen])
        return len(tokens.unique()) == len(tokens)

    def _computed(self, expert: int) -> Iterator[Seen]:
        token, gates = self.seen[expert]
        for part in torch.arange(len(token)).split(CHUNK):
            yield token[part].to(self.layer.device), self.layer.hidden(token[part], gates[part], expert)

    def of(self, expert: int, used: torch.Tensor) -> Iterator[Seen]:
        """Yield those of the tokens `used`, bool [T], that a stored expert sees, and its units, some at a time."""
        for token, hidden in [self.kept[expert]] if self.fits else self._computed(expert):
            chosen = used[token]
            yield token[chosen], hidden[chosen]

    def output(self, weight: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [T, D] with output matrices [D, N], zero but for the tokens `used`, bool [T]."""
        total = weight.new_zeros(len(used), len(weight))
        for expert, part in enumerate(weight.split(self.widths, 1)):
            for token, hidden in self.of(expert, used):
                total.index_add_(0, token, hidden.to(weight) @ part.T)
        return total

    def against(self, values: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Return the sum of `y h^T` [D, N] over the tokens `used`, bool [T], for `values` y [T, D]."""
        total = values.new_zeros(values.shape[1], sum(self.widths))
        for expert, part in enumerate(total.split(self.widths, 1)):
            for token, hidden in self.of(expert, used):
                part.addmm_(values[token].T, hidden.to(values))
        return total

    def blocks(self, used: torch.Tensor) -> list[torch.Tensor]:
        """Return the Gram matrix [F, F] of each expert's units over the tokens `used`, bool [T]."""
        found = [self.start.new_zeros(width, width, dtype=torch.float32) for width in self.widths]
        for expert, block in enumerate(found):
            for _, hidden in self.of(expert, used):
                block.addmm_(hidden.T, hidden)
        return found

    def gram(self, used: torch.Tensor) -> torch.Tensor:
        """Return the sum of `h h^T` over the tokens `used`, bool [T], float64 [N, N]: pair by pair of experts."""
        rows = [_joined(self.of(expert, used), width) for expert, width in enumerate(self.widths)]
        gram = self.start.new_zeros(sum(self.widths), sum(self.widths))
        blocks = [part.split(self.widths, 1) for part in gram.split(self.widths, 0)]
        place = torch.full((len(used),), -1, device=gram.device)
        for one, (token, hidden) in enumerate(rows):
            place.fill_(-1)[token] = torch.arange(len(token), device=gram.device)
            for other, (theirs, states) in enumerate(rows[: one + 1]):
                met = place[theirs]
                both = (met >= 0).nonzero()[:, 0]
                product = hidden[met[both]].T @ states[both]
                blocks[one][other].copy_(product)
                blocks[other][one].copy_(product.T)
        return gram


def _joined(parts: Iterator[Seen], width: int) -> Seen:
    """Return the tokens int [n] and units [n, F] of all parts."""
    found = list(parts)
    if not found:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, width)
    return torch.cat([token for token, _ in found]), torch.cat([hidden for _, hidden in found])


def refit_jointly(layer: LayerFit, ridges: Sequence[float], *, memory_limit: int, final: bool = True) -> JointFit:
    """Return the output matrices with which the layer's output is nearest to the original's, as held-out tokens judge.

    Args:
        ridges: towards the weights that the experts have, in multiples of the mean diagonal of the Gram matrix of all
            units; tried from the largest on until one does worse than the one before.
        memory_limit: bytes; where the normal equations [N, N] take more, conjugate gradients go over the tokens.
        final: whether the weights are fitted to the held-out tokens too once they have chosen the ridge.
    """
    units = Units(layer, memory_limit)
    parts, target = layer.parts.to(layer.device), layer.target().to(layer.device)
    judge = parts == HELD_OUT
    missing = target - layer.constant.to(target) - units.output(units.start.float(), torch.ones_like(judge))
    before, energy = (part[judge].double().square().sum().item() for part in (missing, target))
    kept = JointFit(list(units.start.split(units.widths, 1)), None, before, before, energy)
    if judge.all() or not judge.any():
        return kept
    solve = _solved if _is_dense(units) else _solved_by_rows
    found = solve(units, missing, sorted(ridges, reverse=True), parts, final)
    if found is None:
        return kept
    ridge, after, change = found
    return JointFit(list((units.start + change).split(units.widths, 1)), ridge, before, after, energy)


@dataclass(frozen=True)
class JointEquations:
    """Sums over some tokens: `cross` m h^T [D, N] of what is missing and the units, and their Gram matrix.

    `blocks` are the parts of it along the diagonal that are not zero: the whole [N, N], or where every token sees but
    one expert (top-1 routing) a matrix [F, F] for each.
    """

    cross: torch.Tensor
    blocks: list[torch.Tensor]

    @classmethod
    def over(cls, units: Units, missing: torch.Tensor, used: torch.Tensor) -> "JointEquations":
        """Return the sums over the tokens `used`, bool [T], of what the output lacks, [T, D]."""
        blocks = [block.double() for block in units.blocks(used)] if units.are_apart else [units.gram(used)]
        return cls(units.against(missing, used).double(), blocks)

    def __sub__(self, other: "JointEquations") -> "JointEquations":
        blocks = [torch.sub(one, two, out=two) for one, two in zip(self.blocks, other.blocks, strict=True)]
        return JointEquations(self.cross - other.cross, blocks)

    def __add__(self, other: "JointEquations") -> "JointEquations":
        blocks = [one.add_(two) for one, two in zip(self.blocks, other.blocks, strict=True)]
        return JointEquations(self.cross + other.cross, blocks)

    def each(self, ladder: Sequence[float]) -> Iterator[torch.Tensor]:
        """Yield the change of each ridge, to be judged: in single precision, half the time and near enough."""
        return (self.solved(ridge, torch.float32) for ridge in ladder)

    def solved(self, ridge: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return the change X [D, N] that minimises `|X h - m|^2 + ridge * scale * |X|^2`, in the dtype given.

        A matrix that is not positive in a small dtype is solved in float64.
        """
        added = ridge * torch.cat([block.diagonal() for block in self.blocks]).mean()
        parts = self.cross.split([len(block) for block in self.blocks], 1)
        return torch.cat(
            [_ridged(block, part, added, dtype) for block, part in zip(self.blocks, parts, strict=True)], 1
        )


def _ridged(gram: torch.Tensor, cross: torch.Tensor, added: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    matrix = gram.to(dtype, copy=True)
    matrix.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed and dtype == torch.float64:
        raise ValueError("A ridge is too small to solve for output matrices: raise the smallest of `ridges`.")
    if failed:
        return _ridged(gram, cross, added, torch.float64).to(dtype)
    return torch.cholesky_solve(cross.to(dtype).T, factor).T


def _solved(
    units: Units, missing: torch.Tensor, ladder: Sequence[float], parts: torch.Tensor, final: bool
) -> tuple[float, float, torch.Tensor] | None:
    """Return the ridge that does best, its error on the held-out tokens, and the change; None for no gain."""
    judge = parts == HELD_OUT
    sums = JointEquations.over(units, missing, ~judge)
    if not sums.cross.any():
        return None
    changes: list[torch.Tensor] = []
    judged = [_errors(units, missing, sums.each(ladder), judge, kept=changes)]
    for fold in folds_of([parts]):
        rest = sums - JointEquations.over(units, missing, parts == fold)
        judged.append(_errors(units, missing, rest.each(ladder), parts == fold))
    best = best_ridge(judged)
    if best is None:
        return None
    change = changes[best]
    if final:
        change = (sums + JointEquations.over(units, missing, judge)).solved(ladder[best])
    return ladder[best], judged[0][best + 1], change


def _errors(
    units: Units,
    missing: torch.Tensor,
    changes: Iterable[torch.Tensor],
    judge: torch.Tensor,
    *,
    stops: bool = True,
    kept: list[torch.Tensor] | None = None,
) -> list[float]:
    """Return the errors of a trial on the tokens of `judge`: of no change, and of each of the changes.

    Args:
        stops: whether changes behind the first that does worse than the one before are left out.
        kept: where the changes are put.
    """
    judged = [missing[judge].double().square().sum().item()]
    for change in changes:
        if kept is not None:
            kept.append(change)
        judged.append(_missed(units, missing, change, judge))
        if stops and len(judged) > 2 and judged[-1] > judged[-2]:
            break
    return judged


def _missed(units: Units, missing: torch.Tensor, change: torch.Tensor, judge: torch.Tensor) -> float:
    left = missing[judge] - units.output(change.float(), judge)[judge]
    return left.double().square().sum().item()


def _solved_by_rows(
    units: Units, missing: torch.Tensor, ladder: Sequence[float], parts: torch.Tensor, final: bool
) -> tuple[float, float, torch.Tensor] | None:
    """Do what `_solved` does without the Gram matrix, for so many rows of the output matrices as memory holds."""
    # About eight matrices of a block in float32 are alive at a time.
    size = max(1, units.memory_limit // (8 * 4 * sum(units.widths)))
    blocks = [slice(first, first + size) for first in range(0, len(units.start), size)]
    judged = []
    for left_out in (HELD_OUT, *folds_of([parts])):
        used, judge = (parts != HELD_OUT) & (parts != left_out), parts == left_out
        found = [
            _errors(
                units,
                missing[:, rows],
                _changes(units, missing[:, rows], ladder, used),
                judge,
                stops=len(blocks) == 1,
            )
            for rows in blocks
        ]
        judged.append([sum(errors) for errors in zip(*found, strict=True)])
    best = best_ridge(judged)
    if best is None:
        return None
    used = torch.ones_like(parts, dtype=torch.bool) if final else parts != HELD_OUT
    changes = [next(_changes(units, missing[:, rows], [ladder[best]], used)) for rows in blocks]
    return ladder[best], judged[0][best + 1], torch.cat(changes)


def _is_dense(units: Units) -> bool:
    """Tell whether there is room for the normal equations, their factor, and what is computed of them."""
    size = sum(width**2 for width in units.widths) if units.are_apart else sum(units.widths) ** 2
    return 4 * 8 * size <= units.memory_limit


def _changes(
    units: Units, missing: torch.Tensor, ridges: Sequence[float], used: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield per ridge what `JointEquations.solved` would, for some rows `missing` [T, d] over the tokens `used`."""
    cross, blocks = units.against(missing, used), units.blocks(used)
    scale = torch.cat([block.diagonal() for block in blocks]).mean()
    change = torch.zeros_like(cross)
    for ridge in ridges:
        change = _iterated(units, cross, blocks, ridge * scale, used, change)
        yield change


def _iterated(
    units: Units,
    cross: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    ridge: torch.Tensor,
    used: torch.Tensor,
    guess: torch.Tensor,
) -> torch.Tensor:
    """Solve by conjugate gradients over the tokens; each expert's own normal equations precondition."""
    eyes = [torch.eye(len(block), dtype=torch.float64, device=block.device) for block in blocks]
    factors = [
        torch.linalg.cholesky(block.double() + ridge * eye).to(block) for block, eye in zip(blocks, eyes, strict=True)
    ]

    def times(matrix: torch.Tensor) -> torch.Tensor:
        return units.against(units.output(matrix, used), used) + ridge * matrix

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        parts = zip(residual.split(units.widths, 1), factors, strict=True)
        return torch.cat([torch.cholesky_solve(part.T, factor).T for part, factor in parts], 1)

    return conjugate_gradients(times, cross, precondition, guess)
