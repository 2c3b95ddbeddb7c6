"""What decides on a result: a size, for which the rest is chosen by measured effect, or experts and bits by hand."""

from dataclasses import dataclass, replace
from typing import Any

from hf_mcsmoe.cli.options import Storage, described, parse_experts
from hf_mcsmoe.methods.choice import BITS, REDUCTIONS
from hf_mcsmoe.methods.config import MergeConfig, option_help
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.search.config import AUTO, SizeConfig

# What is chosen for where nothing is said: this share of the bytes of the source.
DEFAULT_SIZE = 0.5
MERGE = {"rich_help_panel": "Merge"}


@dataclass(frozen=True)
class Dial:
    """A size, or experts and what they are stored as.

    Raises:
        ValueError: a value that is none, options that exclude each other, or that would do nothing.
    """

    size: str | None = described(
        None,
        "size of the result's weight files (20GB, 800MB) or their share of the source's (0.4): experts and bits are "
        "chosen for it, layer by layer",
        show_default=f"{DEFAULT_SIZE}, unless --experts is given",
    )
    bits: str | None = described(
        None,
        f"bits a weight of experts: {', '.join(map(str, BITS))}; several (4,8) are those to choose from",
        show_default="any of them; with --experts none, weights stay as they are",
    )
    group_size: int | None = described(
        None, option_help("group_size", SizeConfig), show_default=str(SizeConfig.group_size), min=1
    )
    reduce: str | None = described(
        None, option_help("reduce", SizeConfig), show_default=f"{AUTO}; with --experts merge"
    )
    uniform_experts: bool = described(False, "with --size: " + option_help("uniform_experts", SizeConfig))
    experts: str | None = described(None, option_help("experts") + "; instead of --size", **MERGE)
    skip: list[str] | None = described(None, option_help("skip"), **MERGE)

    def __post_init__(self) -> None:
        if self.reduce not in (None, AUTO, *REDUCTIONS):
            raise ValueError(f"--reduce {self.reduce!r} must be one of {', '.join((AUTO, *REDUCTIONS))}.")
        several = len(self.allowed_bits) > 1
        by_hand = {
            "--size says how large, and --experts how many experts: give one of them.": self.size is not None,
            "--uniform-experts is about what --size chooses; beside --experts give --budget uniform.": (
                self.uniform_experts
            ),
            f"--bits {self.bits} are what --size may choose from; beside --experts give one of them.": several,
            f"--group-size {self.group_size} is of weights in few bits: give --bits as well.": (
                self.group_size is not None and self.bits is None
            ),
        }
        for sentence, is_wrong in by_hand.items():
            if self.is_by_hand and is_wrong:
                raise ValueError(sentence)

    @property
    def is_by_hand(self) -> bool:
        """Whether experts and bits are said, not chosen."""
        return self.experts is not None

    @property
    def allowed_bits(self) -> tuple[int, ...]:
        """The bits that are named, the largest first.

        Raises:
            ValueError: one of them cannot be stored.
        """
        names = [name.strip() for name in (self.bits or "").split(",")] if self.bits is not None else []
        if unknown := [name for name in names if name not in map(str, BITS)]:
            raise ValueError(
                f"--bits {self.bits}: {unknown[0] or 'nothing'} is none of the bits that weights are stored in, "
                f"{', '.join(map(str, BITS))}; give one, or several with commas (4,8)."
            )
        return tuple(bits for bits in BITS if str(bits) in names)

    def size_config(self, merge: MergeConfig, storage: Storage) -> SizeConfig | None:
        """Return what is chosen for a size, and from what; None where experts and bits are said.

        Raises:
            ValueError: it is no size, or a share of S is given, which is not chosen.
        """
        if self.is_by_hand:
            return None
        if storage.keep is not None:
            raise ValueError(
                f"--keep {storage.keep} is a share of S that --size does not choose: leave it out, or say with "
                "--experts how many experts to keep (1.0 keeps all) in place of --size."
            )
        given = {
            "size": self.size,
            "bits": self.allowed_bits or None,
            "reduce": self.reduce,
            "group_size": self.group_size,
            "ranks": None if storage.rank is None else (storage.rank,),
        }
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SizeConfig(
            **{"size": DEFAULT_SIZE, **known}, uniform_experts=self.uniform_experts, min_experts=merge.min_experts
        )

    def quantization(self) -> QuantizationConfig | None:
        """Return in how many bits experts are stored; None where nothing is said, or a size decides."""
        if not self.is_by_hand or self.bits is None:
            return None
        (bits,) = self.allowed_bits
        return QuantizationConfig(bits=bits, group_size=self.group_size, skip=tuple(self.skip or ()))

    def apply(self, config: MergeConfig) -> MergeConfig:
        """Return the configuration of the merge with this choice.

        Raises:
            ValueError: `experts` is no number, or one out of range.
        """
        given: dict[str, Any] = {"skip": tuple(self.skip or ())}
        if self.experts is not None:
            given["experts"] = parse_experts(self.experts)
            given["reduce"] = self.reduce or config.reduce
        return replace(config, **given)
