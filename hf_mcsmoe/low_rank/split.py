"""Splitting a matrix into low rank + sparse, `W = U V + S`: factors, rows or columns, refit of the next matrix."""

from collections.abc import Callable

import torch

from hf_mcsmoe.low_rank.linear import low_rank_factors
from hf_mcsmoe.methods.registry import Registry

FACTORISATION = Registry("factorisation")
Factors = tuple[torch.Tensor, torch.Tensor]
# Added to the diagonal of second moments, as a share of its mean.
RIDGE = 1e-3
# The least importance that a row can have, as a share of the largest.
LEAST = 1e-6


@FACTORISATION.register("svd", paper="2306.11222")
def svd(
    weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None, importance: torch.Tensor | None = None
) -> Factors:
    """Return `U = U_r sqrt(Sigma_r)` [out, R] and `V = sqrt(Sigma_r) V_r^T` [R, in]: the nearest product of rank R.

    Args:
        weight: [out, in].
        moment: not used.
        importance: not used.
    """
    return low_rank_factors(weight, rank)


@FACTORISATION.register("weighted_svd", paper="2403.07378")
def weighted_svd(
    weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None, importance: torch.Tensor | None = None
) -> Factors:
    """Return the U and V of rank R whose product errs least on the inputs: `min E sum_i c_i ((W - U V) x)_i^2`.

    Args:
        weight: [out, in].
        moment: second moment of the inputs, `E[x x^T]` [in, in]; without it this is `svd`.
        importance: what an error of each output counts, `c` [out]; all the same by default.
    """
    if moment is None or not moment.any():
        return svd(weight, rank)
    if importance is None or not importance.any():
        return low_rank_factors(weight, rank, damped(moment))
    scale = importance.clamp(min=LEAST * importance.max()).sqrt().to(weight.device, torch.float32)[:, None]
    u, v = low_rank_factors(weight * scale, rank, damped(moment))
    return u / scale, v


def damped(moment: torch.Tensor) -> torch.Tensor:
    """Return a second moment [in, in] in float64 with a small ridge, so that it can be inverted."""
    moment = moment.double()
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)


def row_errors(residual: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Return what each row [in] of `residual` [out, in] costs if it is dropped: `E (r x)^2`, or `|r|^2`, as [out]."""
    residual = residual.double()
    weighted = residual if moment is None else residual @ moment.double()
    return (weighted * residual).sum(-1)


def split(
    weight: torch.Tensor,
    rank: int,
    kept_rows: int,
    moment: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    factorise: str | Callable[..., Factors] = "weighted_svd",
    rounds: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `u` [out, R], `v` [R, in] and `kept` bool [out]: the rows that S restores exactly.

    The rows that U V fits worst are kept; since S holds them whole, U V is fitted again to the others, and so on.

    Args:
        weight: [out, in].
        kept_rows: how many rows S keeps.
        moment: see `weighted_svd`.
        importance: see `weighted_svd`; it weighs the rows' errors too.
    """
    moment = None if moment is None or not moment.any() else moment
    kept = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    method = FACTORISATION[factorise]
    weight = weight.float()
    for _ in range(rounds if kept_rows else 1):
        _, v = method(weight.masked_fill(kept[:, None], 0), rank, moment, importance)
        u = project(weight, v, moment)
        errors = row_errors(weight - u @ v, moment)
        errors = errors if importance is None else errors * importance.to(errors)
        kept = torch.zeros_like(kept)
        kept[errors.topk(kept_rows).indices] = True
    return u, v, kept


def split_columns(
    weight: torch.Tensor,
    rank: int,
    kept_columns: int,
    moment: torch.Tensor | None = None,
    factorise: str | Callable[..., Factors] = "weighted_svd",
    rounds: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `u` [out, R], `v` [R, in], S [out, in] and `kept` bool [in], the columns of S that are not zero.

    With free values in the kept columns, what U V has to fit is the other inputs less what the kept ones say of them;
    the columns that U V fits worst are kept, and so on.

    Args:
        weight: [out, in].
        rank: no more than the columns that are left.
        kept_columns: how many columns S keeps.
        moment: see `weighted_svd`.
    """
    weight = weight.float()
    moment = None if moment is None or not moment.any() else damped(moment)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    inputs = identity if moment is None else moment
    kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    for _ in range(rounds if kept_columns else 1):
        u, v = _beside(weight, rank, kept, moment, factorise)
        errors = (weight - u @ v).double().square().sum(0) * inputs.diagonal()
        kept = torch.zeros_like(kept)
        kept[errors.topk(kept_columns).indices] = True
    u, v = _beside(weight, rank, kept, moment, factorise)
    rest = (weight - u @ v).double()
    values = torch.linalg.solve(inputs[kept][:, kept], (rest @ inputs[:, kept]).T).T
    return u, v, torch.zeros_like(weight).index_copy(1, kept.nonzero()[:, 0], values.float()), kept


def _beside(
    weight: torch.Tensor,
    rank: int,
    kept: torch.Tensor,
    moment: torch.Tensor | None,
    factorise: str | Callable[..., Factors],
) -> Factors:
    """Return U and V, zero in the columns `kept` bool [in], that err least where those have the best values."""
    free, inputs = ~kept, None
    if moment is not None:
        across = moment[free][:, kept]
        inputs = moment[free][:, free] - across @ torch.linalg.solve(moment[kept][:, kept], across.T)
        inputs = (inputs + inputs.T) / 2
    u, v = FACTORISATION[factorise](weight[:, free], rank, inputs, None)
    return u, torch.zeros(len(v), len(kept), dtype=v.dtype, device=v.device).index_copy(1, free.nonzero()[:, 0], v)


def project(weight: torch.Tensor, v: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Return the `u` [out, R] with which `u v` errs least against `weight` [out, in] for a given `v` [R, in]."""
    weighted = v.double() if moment is None else v.double() @ moment.double()
    gram = weighted @ v.double().T
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(v), dtype=torch.float64, device=v.device)
    return torch.linalg.solve(gram + ridge, weighted @ weight.double().T).T.float()


def refit_output(weight: torch.Tensor, cross: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return W' [out, in] with which hidden states h' err least against those of the original, W h.

    Args:
        weight: W [out, in].
        cross: `E[h h'^T]` [in, in].
        moment: `E[h' h'^T]` [in, in]; where it is zero, W stays.
    """
    if not moment.any():
        return weight
    gram = damped(moment)
    # The ridge pulls towards W, not towards 0.
    pull = (gram - moment.double()).diagonal().diag()
    return torch.linalg.solve(gram, (weight.double() @ (cross.double() + pull)).T).T.to(weight.dtype)
