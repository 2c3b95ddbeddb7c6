"""Options of a search for a size. Each is described once, here; the command line reads the descriptions."""

from dataclasses import dataclass

from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.choice import AUTO, BITS, REDUCTIONS
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.size import parse_size

# How output matrices are fitted, unless something else is asked for, and what else can be.
JOINT = RepairConfig(method="joint")
CLOSED_FORMS = ("joint", "refit", "none")
# Of what the matrices of experts have the same bits, groups and symmetry: of nothing, each layer, or the whole model.
ALIKE = NOTHING, LAYER, MODEL = ("nothing", "layer", "model")


@dataclass(frozen=True)
class SizeConfig(Options):
    """A size, and what may be chosen for it: experts, how they become fewer, bits.

    Raises:
        ValueError: no size, bits that cannot be stored, or a number out of range.
    """

    file_name = "mcsmoe_size.json"

    size: str | float = option(0.5, "size of the weight files: 20GB, 800MB, 12345678B, or a share of the source's")
    bits: tuple[int, ...] = option(BITS, "bits a weight that may be chosen, beside those it has")
    reduce: str = option(AUTO, "how a layer comes to fewer experts: merge, prune or auto, by measured effect")
    uniform_experts: bool = option(False, "one count of experts for all layers")
    min_experts: int = option(1, "fewest experts in a layer; never fewer than a token picks")
    group_size: int = option(64, "weights that share a scale, where that divides their matrix")
    alike: str = option(NOTHING, "of what matrices are stored alike, without zero points: nothing, layer, model")
    counts: tuple[int, ...] | None = option(None, "numbers of experts that may be chosen; any unless given")
    ranks: tuple[int, ...] | None = option(
        None,
        "ranks of low rank + sparse to choose from (one: for all); an eighth, a sixteenth of the smaller side",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        parse_size(self.size)
        for bits in self.bits:
            if bits not in BITS:
                raise ValueError(f"bits={bits!r} must be of {', '.join(map(str, BITS))}.")
        if self.reduce not in (AUTO, *REDUCTIONS):
            raise ValueError(f"reduce={self.reduce!r} must be one of {', '.join(map(repr, (AUTO, *REDUCTIONS)))}.")
        if self.alike not in ALIKE:
            raise ValueError(f"alike={self.alike!r} must be one of {', '.join(map(repr, ALIKE))}.")
        for name in ("ranks", "counts"):
            if any(value < 1 for value in vars(self)[name] or ()):
                raise ValueError(f"{name}={vars(self)[name]!r} must be whole numbers from 1 on.")
        for name, value in (("min_experts", self.min_experts), ("group_size", self.group_size)):
            if value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 on.")

    @classmethod
    def of(cls, size: "SizeConfig | str | float | None") -> "SizeConfig | None":
        """Return the options for a size alone, or those that are given."""
        return size if size is None or isinstance(size, SizeConfig) else cls(size)

    def check_repair(self, repair: RepairConfig | None) -> None:
        """Raise ValueError where each of many choices cannot be repaired so."""
        if repair and repair.method not in CLOSED_FORMS:
            raise ValueError(
                f"size={self.size!r} tries many choices, each with its repair, and {repair.method!r} is none that is "
                f"solved at once: choose the repair {', '.join(CLOSED_FORMS[:-1])} or {CLOSED_FORMS[-1]}, or say how "
                "many experts to keep in place of a size."
            )
        if repair and repair.sequential:
            raise ValueError(
                f"size={self.size!r} chooses layers by themselves, and has no use for a repair with sequential=True: "
                "leave it out."
            )

    @property
    def reductions(self) -> tuple[str, ...]:
        """The ways in which a layer may come to fewer experts."""
        return REDUCTIONS if self.reduce == AUTO else (self.reduce,)
