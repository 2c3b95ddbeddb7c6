"""Options of a decomposition. Each is described once, here; the command line reads the descriptions."""

from collections.abc import Callable
from dataclasses import dataclass

from hf_mcsmoe.low_rank.split import FACTORISATION
from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.registry import unknown

SCOPES = ("layer", "global")
# Share of S that is kept unless another is given (paper, section 4).
KEEP = 0.1


@dataclass(frozen=True)
class LoSparseConfig(Options):
    """How MC-SMoE stores merged experts as `W = U V + S`; the rank is given by exactly one of three options.

    Raises:
        ValueError: a number out of range, none or several of the ways to give the rank, an unknown name.
    """

    file_name = "mcsmoe_low_rank.json"

    rank: int | None = option(None, "rank of U V, 32 unless given otherwise")
    parameter_ratio: float | None = option(None, "stored share of each matrix, U, V and kept rows together")
    energy: float | None = option(None, "share of the squared singular values that U V holds")
    scope: str = option("layer", "whether weights get their ranks one by one (layer) or compete (global)")
    keep: float = option(KEEP, "share of S kept in the end: rows of W_in's, columns of W_out's")
    factorisation: str | Callable = option("weighted_svd", "how U and V are found: weighted_svd (needs data) or svd")
    skip: tuple[str, ...] = option((), "layers to leave dense: patterns of layer names")
    allow_dense: bool = option(False, "leave a weight dense where its factors would be larger, instead of refusing")

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        FACTORISATION.check(self.factorisation)
        check_fields(self)
        if self.scope not in SCOPES:
            raise ValueError(unknown("scope", self.scope, list(SCOPES)))
        shares = {"parameter_ratio": self.parameter_ratio, "energy": self.energy}
        given = [name for name, value in {"rank": self.rank, **shares}.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; the rank follows from one of them.")
        if not given:
            object.__setattr__(self, "rank", 32)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number, at least 1.")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must be a share in [0, 1].")
        for name, share in shares.items():
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share!r} must be a share in (0, 1].")
        if self.parameter_ratio is not None and self.parameter_ratio <= self.keep:
            raise ValueError(
                f"parameter_ratio={self.parameter_ratio} is no more than keep={self.keep}, which the rows of S alone "
                "take: raise the ratio or lower keep."
            )
