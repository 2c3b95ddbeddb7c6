"""What is to become of one layer: how many experts, by merging or pruning, of what rank, in how many bits."""

from dataclasses import dataclass

# Bits a weight that can be stored, beside the 16 or 32 that it has.
BITS = (8, 4, 3, 2)
# How a layer comes to fewer experts, and what leaves that to the measured effect.
REDUCTIONS = ("merge", "prune")
AUTO = "auto"


@dataclass(frozen=True)
class Grid:
    """The values that a stored weight can have: `bits` a weight, in groups of `group_size` along the input axis.

    A group has a scale, and unless it is `symmetric` (around zero) a zero point.

    Raises:
        ValueError: bits that cannot be stored, or a group of no weight.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r} must be one of {', '.join(map(str, BITS))}.")
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r} must be a whole number of weights, from 1 on.")


@dataclass(frozen=True)
class Choice:
    """What is to become of one layer: `experts` G, and what they are stored as.

    `reduce` says how a layer of more experts comes to G. `w_in` (gate and up) and `w_out` are the grids of the two
    matrices; None leaves their values as they are. `rank` stores both as low rank + sparse, with the share `keep` of
    S.

    Raises:
        ValueError: no expert, or an unknown reduction.
    """

    experts: int
    reduce: str = "merge"
    w_in: Grid | None = None
    w_out: Grid | None = None
    rank: int | None = None
    keep: float = 0.1

    def __post_init__(self) -> None:
        if type(self.experts) is not int or self.experts < 1:
            raise ValueError(f"experts={self.experts!r} must be a whole number of experts, from 1 on.")
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce={self.reduce!r} must be one of {', '.join(map(repr, REDUCTIONS))}.")
