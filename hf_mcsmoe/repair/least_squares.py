"""Least squares for an expert's output matrix: streamed normal equations, ridge towards the weights it has.

The ridge is chosen by trials, of which each leaves some tokens out of the fit and judges it on these: one the tokens
that are held out, and where there are several data sets one more for each of them, for text of kinds that were not
calibrated on.

Letters as elsewhere, with F counting a column of ones where a bias is fitted along: `hidden` [n, F] are the expert's
hidden states times the weights that the router gave it, `target` [n, D] what its output should be.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# The part of the tokens that no fit sees before a ridge is chosen; further parts are data sets, from 0 on.
HELD_OUT = -1
# Hidden states [n, F], targets [n, D], and int [n], the parts that they are of.
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
RowSource = Callable[[], Iterable[Rows]]
# Yields, per ridge, some rows of the output matrix.
Solve = Callable[[slice, Sequence[float]], Iterator[torch.Tensor]]

MAX_ITERATIONS = 100
TOLERANCE = 1e-6


@dataclass(frozen=True)
class ExpertFit:
    """What became of one expert.

    `weight` float64 [D, F], empty in a report; `ridge` that was chosen, None where the weight stays as it was;
    `tokens` that it was fitted to; `before` and `after`, squared errors on held-out tokens, and `energy`, the squared
    norm of their targets. `after` is that of a fit without these tokens, which the weight then includes.
    """

    weight: torch.Tensor
    ridge: float | None
    tokens: int
    before: float
    after: float
    energy: float

    @property
    def relative(self) -> tuple[float | None, float | None]:
        """The relative errors before and after, on held-out tokens."""
        return relative(self.before, self.energy), relative(self.after, self.energy)

    def without_weight(self) -> "ExpertFit":
        """Return the fit without its weight, which the model holds."""
        return replace(self, weight=self.weight.new_empty(0))

    def to_dict(self) -> dict[str, Any]:
        """Return tokens, ridge and relative errors as JSON values."""
        before, after = self.relative
        return {"tokens": self.tokens, "ridge": self.ridge, "before": before, "after": after}


def relative(error: float, energy: float) -> float | None:
    """Return the root of squared error over squared norm; None where there is nothing to compare with."""
    return math.sqrt(max(error, 0.0) / energy) if energy > 0 else None


@dataclass
class NormalEquations:
    """Sums over tokens in float64: `gram` [F, F] of `h h^T`, `cross` [D, F] of `y h^T`, `energy` of `y^T y`."""

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, like: torch.Tensor) -> "NormalEquations":
        """Return the sums over no token, for an output matrix `like` [D, F]."""
        return cls(like.new_zeros(like.shape[1], like.shape[1]), torch.zeros_like(like))

    def add(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens: hidden states [n, F] and targets [n, D]."""
        hidden, target = hidden.to(self.gram), target.to(self.gram)
        self.gram.addmm_(hidden.T, hidden)
        self.cross.addmm_(target.T, hidden)
        self.energy += target.square().sum().item()
        self.count += len(hidden)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(*(getattr(self, key) + getattr(other, key) for key in vars(self)))

    def error(self, weight: torch.Tensor) -> float:
        """Return `sum ||W h - y||^2` of a matrix [D, F]."""
        return ((weight @ self.gram - 2 * self.cross) * weight).sum().item() + self.energy

    def solve(self, start: torch.Tensor, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        """Yield, per ridge, the `W` [D, F] that minimises `error(W) + ridge * mean(diag A) * ||W - start||^2`.

        One eigendecomposition serves all ridges: `W = start + (B - start A) (A + ridge m I)^-1`.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        residual = (self.cross - start @ self.gram) @ vectors
        scale = self.gram.diagonal().mean()
        for ridge in ridges:
            yield start + residual / (values.clamp(min=0) + ridge * scale) @ vectors.T


def refit(
    rows: RowSource, start: torch.Tensor, ridges: Sequence[float], *, memory_limit: int, final: bool = True
) -> ExpertFit:
    """Return the output matrix that fits the targets best, as held-out tokens judge; `start` itself is a candidate.

    Args:
        rows: gives the expert's tokens, as often as it is called.
        start: the weights that the ridge pulls to, float64 [D, F].
        ridges: in multiples of the mean of the Gram matrix's diagonal.
        memory_limit: bytes; a wider expert is solved without a matrix [F, F]: over its tokens where they are few, else
            by conjugate gradients.
        final: whether the weight is fitted to the held-out tokens too once they have chosen the ridge.
    """
    # Two sums [F, F] and what their eigendecomposition takes, and where data sets are left out a sum of each.
    folds = folds_of(part for _, _, part in rows())
    if (6 + (len(folds) + 1) * bool(folds)) * 8 * start.shape[1] ** 2 > memory_limit:
        return _refit_wide(rows, start, sorted(ridges, reverse=True), memory_limit, final)
    sums = {part: NormalEquations.empty(start) for part in (HELD_OUT, *(folds or [0]))}
    for hidden, target, parts in rows():
        for part, own in sums.items():
            chosen = parts == part if folds or part == HELD_OUT else parts != HELD_OUT
            own.add(hidden[chosen], target[chosen])
    judge = sums.pop(HELD_OUT)
    fit = functools.reduce(operator.add, sums.values())
    before = judge.error(start)
    kept = ExpertFit(start, None, fit.count, before, before, judge.energy)
    if not (fit.count and judge.count and fit.gram.diagonal().sum() > 0):
        return kept
    judged = [_tried(fit, judge, start, ridges)]
    judged += [_tried(_without(sums, fold), sums[fold], start, ridges) for fold in folds]
    best = best_ridge(judged)
    if best is None:
        return kept
    weight = next((fit + judge if final else fit).solve(start, [ridges[best]]))
    return ExpertFit(weight, ridges[best], fit.count, before, judged[0][best + 1], judge.energy)


def folds_of(parts: Iterable[torch.Tensor]) -> list[int]:
    """Return the data sets that are left out in turn: all, where there are several."""
    found = sorted({number for part in parts for number in part.unique().tolist()} - {HELD_OUT})
    return found if len(found) > 1 else []


def _without(sums: dict[int, NormalEquations], fold: int) -> NormalEquations:
    return functools.reduce(operator.add, (own for part, own in sums.items() if part != fold))


def _tried(fit: NormalEquations, judge: NormalEquations, start: torch.Tensor, ridges: Sequence[float]) -> list[float]:
    """Return the errors of a trial: of the start, and of each ridge; those of the start where nothing is fitted to."""
    if not fit.gram.diagonal().sum() > 0:
        return [judge.error(start)] * (len(ridges) + 1)
    return [judge.error(start), *map(judge.error, fit.solve(start, ridges))]


def best_ridge(judged: Sequence[Sequence[float]]) -> int | None:
    """Return the place of the ridge that does best, None where the start does.

    What counts is the sum of two shares of the start's error: on held-out tokens, and on data sets that were left out,
    together. A ridge that does worse than the start on either is none to choose.

    Args:
        judged: per trial, that of the held-out tokens first, the squared errors of the start and of each ridge, as
            far as they were tried.
    """
    inside, *folds = judged
    tried = min(map(len, judged))
    outside = [sum(fold[place] for fold in folds) for place in range(tried)]
    shares = {
        place: inside[place] / inside[0] + (outside[place] / outside[0] if outside[0] > 0 else 0.0)
        for place in range(1, tried)
        if inside[place] < inside[0] and outside[place] <= outside[0]
    }
    return min(shares, key=lambda place: shares[place]) - 1 if shares else None


def mean_shift(rows: RowSource, start: torch.Tensor, *, has_bias: bool, final: bool = True) -> ExpertFit:
    """Return the output matrix moved as little as it takes for the mean output to be the targets' mean.

    With `has_bias` the last column alone moves, else it is a change of rank one along the mean hidden state. `final`
    as in `refit`.
    """
    fit, judge = _Means.empty(start), _Means.empty(start)
    for hidden, target, part in rows():
        held_out = part == HELD_OUT
        fit = fit + _Means.of(hidden[~held_out].to(start), target[~held_out].to(start), start)
        judge = judge + _Means.of(hidden[held_out].to(start), target[held_out].to(start), start)
    moved = fit.moved(start, has_bias)
    before, after, energy = errors(rows, [start, moved])
    if not after < before:
        return ExpertFit(start, None, fit.count, before, before, energy)
    weight = (fit + judge).moved(start, has_bias) if final else moved
    return ExpertFit(weight, 0.0, fit.count, before, after, energy)


@dataclass(frozen=True)
class _Means:
    """Sums over `count` tokens: hidden states [F], and what the outputs miss of their targets [D]."""

    hidden: torch.Tensor
    missing: torch.Tensor
    count: int

    @classmethod
    def empty(cls, like: torch.Tensor) -> "_Means":
        return cls(like.new_zeros(like.shape[1]), like.new_zeros(like.shape[0]), 0)

    @classmethod
    def of(cls, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> "_Means":
        return cls(hidden.sum(0), (target - hidden @ weight.T).sum(0), len(hidden))

    def __add__(self, other: "_Means") -> "_Means":
        return _Means(self.hidden + other.hidden, self.missing + other.missing, self.count + other.count)

    def moved(self, weight: torch.Tensor, has_bias: bool) -> torch.Tensor:
        """Return the weight whose summed outputs miss nothing."""
        direction = torch.zeros_like(self.hidden)
        direction[-1] = 1
        direction = direction if has_bias else self.hidden
        reach = self.hidden @ direction
        return weight + torch.outer(self.missing, direction) / reach if reach != 0 else weight


def errors(rows: RowSource, weights: Sequence[torch.Tensor], judges: int = HELD_OUT) -> list[float]:
    """Return the squared error of each matrix [D, F] on tokens of one part, and the squared norm of their targets."""
    sums = [0.0] * (len(weights) + 1)
    for hidden, target, part in rows():
        judged = part == judges
        states, wanted = hidden[judged].to(weights[0]), target[judged].to(weights[0])
        misses = [states @ weight.T - wanted for weight in weights]
        for position, value in enumerate([*misses, wanted]):
            sums[position] += value.square().sum().item()
    return sums


def _refit_wide(
    rows: RowSource, start: torch.Tensor, ridges: Sequence[float], memory_limit: int, final: bool
) -> ExpertFit:
    """Do what `refit` does without a matrix [F, F], for as many rows of the output matrix at a time as memory holds.

    Args:
        ridges: from the largest to the smallest, each of which starts where the one before it ended.
    """
    seen = [part for _, _, part in rows()]
    judging = sum(int((part == HELD_OUT).sum()) for part in seen)
    count = sum(map(len, seen)) - judging
    if not (count and judging):
        before, energy = errors(rows, [start])
        return ExpertFit(start, None, count, before, before, energy)
    width, number = start.shape[1], count + judging
    # Hidden states and what they become; the Gram matrix of tokens and what its eigendecomposition takes.
    taken = 8 * number * (2 * width + 6 * number)
    method, rest = (_over_tokens, memory_limit - taken) if 2 * taken <= memory_limit else (_iteratively, memory_limit)
    # About eight matrices of a block in float64 are alive at a time.
    size = max(1, rest // (8 * 8 * width))
    blocks = [slice(first, first + size) for first in range(0, len(start), size)]
    trials = [HELD_OUT, *folds_of(seen)]
    found = [_tried_wide(method, rows, start, ridges, blocks, left_out) for left_out in trials]
    judged = [errors_of[:-1] for errors_of in found]
    before, energy, best = found[0][0], found[0][-1], best_ridge(judged)
    if best is None:
        return ExpertFit(start, None, count, before, before, energy)
    solve = method(rows, start, None if final else HELD_OUT)
    weight = torch.cat([next(solve(block, [ridges[best]])) for block in blocks])
    return ExpertFit(weight, ridges[best], count, before, judged[0][best + 1], energy)


def _tried_wide(
    method: Callable[[RowSource, torch.Tensor, int | None], Solve],
    rows: RowSource,
    start: torch.Tensor,
    ridges: Sequence[float],
    blocks: Sequence[slice],
    left_out: int,
) -> list[float]:
    """Return the errors of a trial: of the start and of each ridge, and the squared norm of the targets."""
    sums, solve = [0.0] * (len(ridges) + 2), method(rows, start, left_out)
    for block in blocks:
        weights = [start[block], *solve(block, ridges)]
        for position, value in enumerate(errors(_columns(rows, block), weights, left_out)):
            sums[position] += value
    return sums


def _columns(rows: RowSource, block: slice) -> RowSource:
    return lambda: ((hidden, target[:, block], part) for hidden, target, part in rows())


def _chosen(rows: RowSource, like: torch.Tensor, left_out: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what a weight is fitted to: hidden states, as floats like another tensor's, and targets.

    Args:
        left_out: the part that judges, beside the one that is held out; None for a fit to all.
    """
    for hidden, target, part in rows():
        used = slice(None) if left_out is None else (part != HELD_OUT) & (part != left_out)
        yield hidden[used].to(like), target[used]


def _over_tokens(rows: RowSource, start: torch.Tensor, left_out: int | None) -> Solve:
    """Solve exactly with the Gram matrix [n, n] of n tokens, where they are few for the width.

    With `H` [n, F] and what the start misses, `M` [n, D], `W = start + M^T (H H^T + ridge m I)^-1 H`.
    """
    chosen = functools.partial(_chosen, rows, start, left_out)
    hidden = torch.cat([hidden for hidden, _ in chosen()])
    values, vectors = torch.linalg.eigh(hidden @ hidden.T)
    values = values.clamp(min=0)
    turned, scale = vectors.T @ hidden, hidden.square().sum() / start.shape[1]
    del hidden

    def solve(block: slice, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        target = torch.cat([target[:, block].to(start) for _, target in chosen()])
        missing = vectors.T @ target - turned @ start[block].T
        for ridge in ridges:
            yield start[block] + (missing / (values + ridge * scale)[:, None]).T @ turned

    return solve


def _iteratively(rows: RowSource, start: torch.Tensor, left_out: int | None) -> Solve:
    """Solve by conjugate gradients with diagonal preconditioner, which go over the tokens in every step."""
    chosen = functools.partial(_chosen, rows, start, left_out)

    def times_gram(matrix: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(matrix)
        for hidden, _ in chosen():
            total.addmm_((hidden @ matrix.T).T, hidden)
        return total

    def solve(block: slice, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
        part = start[block]
        missing, diagonal = torch.zeros_like(part), start.new_zeros(start.shape[1])
        for hidden, target in chosen():
            missing.addmm_((target[:, block].to(start) - hidden @ part.T).T, hidden)
            diagonal += hidden.square().sum(0)
        change = torch.zeros_like(part)
        for ridge in ridges:
            own = ridge * diagonal.mean()
            scale = (diagonal + own).clamp(min=torch.finfo(diagonal.dtype).tiny)
            times = functools.partial(_times, times_gram, own)
            change = conjugate_gradients(times, missing, scale.reciprocal().mul, change)
            yield part + change

    return solve


def _times(
    times_gram: Callable[[torch.Tensor], torch.Tensor], ridge: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    return times_gram(matrix) + ridge * matrix


def conjugate_gradients(
    times: Callable[[torch.Tensor], torch.Tensor],
    missing: torch.Tensor,
    precondition: Callable[[torch.Tensor], torch.Tensor],
    guess: torch.Tensor,
) -> torch.Tensor:
    """Solve `times(X) = missing` [D, F], every row by itself, from a guess.

    Args:
        times: multiplies by a symmetric, positive matrix from the right.
        precondition: divides by something near to it.
    """
    solution, tiny = guess, torch.finfo(missing.dtype).tiny
    tolerance = max(TOLERANCE, 10 * torch.finfo(missing.dtype).eps)
    residual = missing - times(guess)
    direction = precondition(residual)
    product = (residual * direction).sum(1, keepdim=True)
    for _ in range(MAX_ITERATIONS):
        if residual.norm() <= tolerance * missing.norm():
            break
        image = times(direction)
        # A row that is solved has a direction of zero.
        step = product / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        solution = solution + step * direction
        residual = residual - step * image
        scaled = precondition(residual)
        previous, product = product, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + product / previous.clamp(min=tiny) * direction
    return solution
