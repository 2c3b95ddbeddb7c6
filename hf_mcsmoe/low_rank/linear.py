"""A single linear layer stored as low rank + structured sparse, `W = U V + S`, and the factors U and V."""

from typing import Any

import torch
from torch import nn

from hf_mcsmoe.modeling.losparse_mcsmoe import LowRankSparse


class LoSparseLinear(LowRankSparse):
    """An `nn.Linear` whose weight is `U V + S` with few rows in S; maps [..., in] to [..., out]."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rank: int, kept_rows: int | None = None
    ) -> None:
        """Make an empty layer.

        Args:
            kept_rows: rows of S in the compact form; None for the training form, which holds all of them.
        """
        super().__init__()
        self.in_features, self.out_features, self.low_rank = in_features, out_features, {}
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.install_low_rank("weight", rank, None if kept_rows is None else [kept_rows])

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        u: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        rank: int | None = None,
        moment: torch.Tensor | None = None,
    ) -> "LoSparseLinear":
        """Return the training form of a dense layer: S is what `U V` lacks, so the outputs are the same.

        Args:
            u: [out, R]; with `v`, instead of `rank`.
            v: [R, in].
            rank: R, for the factors of the singular value decomposition.
            moment: see `low_rank_factors`.

        Raises:
            ValueError: not exactly one of `rank` and both factors, or a rank that the layer does not have.
        """
        out, width = linear.weight.shape
        if (rank is None) == (u is None or v is None):
            raise ValueError("Give either rank=..., or both factors u and v.")
        if rank is not None and not 1 <= rank <= min(out, width):
            raise ValueError(f"rank={rank} must be from 1 to {min(out, width)} for a layer of {out} x {width}.")
        with torch.no_grad():
            if u is None or v is None:
                u, v = low_rank_factors(linear.weight, rank or 0, moment)
            layer: Any = cls(width, out, linear.bias is not None, rank=len(v), kept_rows=None)
            layer.to(linear.weight.device, linear.weight.dtype)
            layer.weight_u.copy_(u)
            layer.weight_v.copy_(v)
            rest = linear.weight.float() - layer.weight_u.float() @ layer.weight_v.float()
            layer.weight_s.copy_(rest)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `states` [..., in] to [..., out]."""
        output = self.factors("weight")[0](states)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Return the sizes, as `print(model)` shows them."""
        entry = self.low_rank["weight"]
        return f"{self.in_features}, {self.out_features}, rank={entry['rank']}, kept_rows={entry['kept_rows']}"


def low_rank_factors(
    weight: torch.Tensor, rank: int, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `u` [out, R] and `v` [R, in], whose product is the nearest of rank R to `weight` [out, in].

    `U_r sqrt(Sigma_r)` and `sqrt(Sigma_r) V_r^T` of the singular value decomposition (LoSparse, section 3.1).

    Args:
        moment: second moment of the inputs, `E[x x^T]` [in, in], positive definite: the product is then the one that
            errs least on them, `min E ||(W - U V) x||^2`.
    """
    root = None if moment is None else torch.linalg.cholesky(moment.double()).float()  # L of L L^T
    target = weight.float() if root is None else weight.float() @ root
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    scale = values[:rank].sqrt()
    u, v = left[:, :rank] * scale, scale[:, None] * right[:rank]
    return u, v if root is None else torch.linalg.solve_triangular(root, v, upper=False, left=False)
