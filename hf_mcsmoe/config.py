"""Options of a merge and of a decomposition. Each is described once, here; the command line reads the descriptions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_mcsmoe.alignment import ALIGNMENT
from hf_mcsmoe.decomposition import FACTORISATION
from hf_mcsmoe.grouping import BUDGET, GROUPING
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.registry import method_name, unknown
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.similarity import SIMILARITY

REFERENCES = ("dominant", "first")
REGISTRIES = {
    "budget": BUDGET,
    "saliency": SALIENCY,
    "similarity": SIMILARITY,
    "grouping": GROUPING,
    "alignment": ALIGNMENT,
    "merging": MERGING,
}


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with its description, which the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MergeConfig:
    """How M-SMoE merges. Methods are given by name, or as a callable of the same signature.

    Raises:
        ValueError: a name that no method has, or a number out of range.
    """

    experts: int | float = option(0.5, "experts to keep: a whole number per layer on average, or a share in (0, 1]")
    budget: str | Callable = option("adaptive", "how layers share the experts: adaptive or uniform")
    min_experts: int = option(1, "experts that every layer keeps at least")
    skip: tuple[str, ...] = option((), "layers to leave whole: patterns of layer names, e.g. 'encoder.block.1.*'")
    saliency: str | Callable = option("frequency", "what makes an expert dominant: frequency or gate")
    similarity: str | Callable = option("router_logits", "which experts belong together: router_logits or random")
    grouping: str | Callable = option("dominant", "how groups form: dominant")
    alignment: str | Callable = option("weight_matching", "how neurons are aligned: weight_matching or none")
    reference: str = option("dominant", "what members are aligned to: their group's dominant expert, or first")
    merging: str | Callable = option("frequency", "weights of the average: frequency, uniform or dominant (prunes)")
    seed: int = option(0, "seed of the random similarity")

    def __post_init__(self) -> None:
        for name, registry in REGISTRIES.items():
            registry[getattr(self, name)]
        if self.reference not in REFERENCES:
            raise ValueError(unknown("reference", self.reference, list(REFERENCES)))
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        is_number = isinstance(self.experts, int | float) and not isinstance(self.experts, bool)
        is_share = isinstance(self.experts, float)
        if not is_number or (not 0 < self.experts <= 1 if is_share else self.experts < 1):
            raise ValueError(
                f"experts={self.experts!r} must be a whole number of experts per layer (8) or a share in (0, 1] (0.5)."
            )
        if isinstance(self.min_experts, bool) or not isinstance(self.min_experts, int) or self.min_experts < 1:
            raise ValueError(
                f"min_experts={self.min_experts!r} must be at least 1 and whole: a layer needs an expert."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a callable is written as its name."""
        values = {key: method_name(value) if callable(value) else value for key, value in asdict(self).items()}
        return {**values, "skip": list(self.skip)}


SCOPES = ("layer", "global")


@dataclass(frozen=True)
class LoSparseConfig:
    """How MC-SMoE stores merged experts as `W = U V + S`; the rank is given by exactly one of three options.

    Raises:
        ValueError: a number out of range, none or several of the ways to give the rank, an unknown name.
    """

    rank: int | None = option(None, "rank of U V, 32 unless given otherwise")
    parameter_ratio: float | None = option(None, "stored share of each matrix, U, V and kept rows together")
    energy: float | None = option(None, "share of the squared singular values that U V holds")
    scope: str = option("layer", "whether weights get their ranks one by one (layer) or compete (global)")
    keep: float = option(0.10, "share of S kept in the end: rows of W_in's, columns of W_out's")
    factorisation: str | Callable = option("weighted_svd", "how U and V are found: weighted_svd (needs data) or svd")
    skip: tuple[str, ...] = option((), "layers to leave dense: patterns of layer names")
    allow_dense: bool = option(False, "leave a weight dense where its factors would be larger, instead of refusing")

    def __post_init__(self) -> None:
        FACTORISATION[self.factorisation]
        if self.scope not in SCOPES:
            raise ValueError(unknown("scope", self.scope, list(SCOPES)))
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        given = [name for name in ("rank", "parameter_ratio", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; the rank follows from one of them.")
        if not given:
            object.__setattr__(self, "rank", 32)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} must be a whole number, at least 1.")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must be a share in [0, 1].")
        for name in ("parameter_ratio", "energy"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must be a share in (0, 1].")
        if self.parameter_ratio is not None and self.parameter_ratio <= self.keep:
            raise ValueError(
                f"parameter_ratio={self.parameter_ratio} is no more than keep={self.keep}, which the rows of S alone "
                "take: raise the ratio or lower keep."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a callable is written as its name."""
        values = {key: method_name(value) if callable(value) else value for key, value in asdict(self).items()}
        return {**values, "skip": list(self.skip)}


def option_help(name: str, config: type = MergeConfig) -> str:
    """Return the description of an option of `MergeConfig`, or of another class of options."""
    return next(item.metadata["help"] for item in fields(config) if item.name == name)
