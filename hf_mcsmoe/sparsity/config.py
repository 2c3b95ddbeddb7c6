"""Options of sparse experts. Each is described once, here; the command line reads the descriptions."""

from collections.abc import Callable
from dataclasses import dataclass

from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.methods.sparsity import PATTERN, SCORE

# The pattern of which an expert becomes narrower: the only one that saves bytes.
UNITS = "units"
PATTERNS = (*PATTERN, UNITS)


@dataclass(frozen=True)
class SparsityConfig(Options):
    """Which weights inside experts are left out.

    Raises:
        ValueError: an unknown name, or a share that is none or does not go with the pattern.
    """

    file_name = "mcsmoe_sparsity.json"

    score: str | Callable = option("moe_pruner", "by which score weights inside experts are left out", SCORE)
    pattern: str = option(
        "unstructured",
        "which of them: unstructured (of each row) or 2:4, zeros that save no byte, or units (whole hidden units; the "
        "only one that saves bytes)",
    )
    share: float = option(0.5, "share of the weights of each expert, or of its hidden units, that is left out")
    skip: tuple[str, ...] = option((), "layers to leave as they are: patterns of layer names")

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        SCORE.check(self.score)
        check_fields(self)
        if self.pattern not in PATTERNS:
            raise ValueError(unknown("pattern", self.pattern, list(PATTERNS)))
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r} must be between 0 and 1.")
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"share={self.share!r} does not go with the pattern 2:4, which leaves out half.")
        if self.pattern == UNITS and self.skip:
            raise ValueError(
                f"skip={', '.join(self.skip)} would leave layers as wide as they are, but a configuration has one "
                "width for all experts: leave it out, or choose another pattern than units."
            )

    @property
    def is_units(self) -> bool:
        """Whether hidden units go, so that experts become narrower."""
        return self.pattern == UNITS
