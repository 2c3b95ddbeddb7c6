"""Options of a merge. Each is described once, here; the command line reads the descriptions."""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Self

from hf_mcsmoe.methods.alignment import ALIGNMENT
from hf_mcsmoe.methods.budget import BUDGET, MEASURED
from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.choice import AUTO, REDUCTIONS
from hf_mcsmoe.methods.grouping import GROUPING
from hf_mcsmoe.methods.merging import MERGING
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.methods.pruning import SELECTION
from hf_mcsmoe.methods.registry import Registry, unknown
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.statistics import with_tokens
from hf_mcsmoe.methods.weighting import WEIGHTING

# Groupings whose groups may have a capacity.
CAPPED = ("dominant", "pseudo_pruning")
REFERENCES = ("dominant", "first")
# What becomes of the router where experts are merged, and for which of these its rows are new ones.
MAP, ROUTERS = "map", ("map", "dominant", "mean", "weighted")
MIXED = ("mean", "weighted")
# The budget that keeps as many experts in each layer.
UNIFORM = "uniform"
# What becomes of the picks of experts that are pruned, and for which of these the router keeps all its rows.
SLICE, ZERO, CONSTANT = PRUNED_ROUTERS = ("slice", "zero", "constant")

# What is lost with an expert is another question than which of a group the others should be like.
DEFAULT_SALIENCY = {"merge": "frequency", "prune": "contribution", AUTO: "contribution"}
REGISTRIES = {
    "budget": BUDGET,
    "saliency": SALIENCY,
    "selection": SELECTION,
    "similarity": SIMILARITY,
    "grouping": GROUPING,
    "weighting": WEIGHTING,
    "alignment": ALIGNMENT,
    "merging": MERGING,
}


def option(default: Any, text: str, registry: Registry | None = None) -> Any:
    """Return a dataclass field with its description, which the command line shows.

    Args:
        registry: of an option that names a method; its names, those registered later included, end the description.
    """
    return field(default=default, metadata={"help": text} | ({"registry": registry} if registry else {}))


def help_of(item: Field) -> str:
    """Return the description of an option."""
    registry = item.metadata.get("registry")
    return item.metadata["help"] + (f": {', '.join(registry)}" if registry else "")


@dataclass(frozen=True)
class MergeConfig(Options):
    """How M-SMoE merges, or how layers are pruned. Methods are given by name, or as a callable of the same signature.

    To prune, only budget, saliency and selection are read: the most salient experts stay, and the router is cut to
    these.

    Raises:
        ValueError: a name that no method has, or a number out of range.
    """

    file_name = "mcsmoe_merge.json"

    experts: int | float = option(0.5, "experts to keep: a whole number per layer on average, or a share in (0, 1]")
    budget: str | Callable = option("adaptive", "how layers share the experts", BUDGET)
    min_experts: int = option(1, "experts that every layer keeps at least")
    skip: tuple[str, ...] = option((), "layers to leave whole: patterns of layer names, e.g. 'encoder.block.1.*'")
    saliency: str | Callable | None = option(
        None, "what makes an expert dominant or worth keeping (frequency; to prune contribution)", SALIENCY
    )
    similarity: str | Callable = option("router_logits", "which experts belong together", SIMILARITY)
    grouping: str | Callable = option("dominant", "how groups form", GROUPING)
    capacity: int | None = option(None, "most experts of a group (groupings dominant and pseudo_pruning)")
    alignment: str | Callable = option("weight_matching", "how neurons are aligned", ALIGNMENT)
    reference: str = option("dominant", "what members are aligned to: their group's dominant expert, or first")
    weighting: str | Callable = option(
        "saliency", "weights of a group's members (dominant prunes the others)", WEIGHTING
    )
    merging: str | Callable = option("average", "how aligned members become one expert", MERGING)
    selection: str | Callable = option(
        "salient", "which experts a pruning leaves (exhaustive tries all subsets of a layer)", SELECTION
    )
    router: str = option(
        MAP,
        "router of merged layers: map (keeps all rows, and a map to groups), or one row for each group, as a plain "
        "checkpoint has: dominant (its dominant expert's), mean, weighted (by the members' weights)",
    )
    pruned_router: str = option(
        SLICE,
        "router of pruned layers: slice (cut to the experts that stay), or whole, and the others give nothing (zero) "
        "or their mean output over the calibration tokens (constant)",
    )
    seed: int = option(0, "seed of the random similarity")
    reduce: str = option(
        "merge",
        "how experts become fewer: merge, or prune, which cuts the router to those it keeps, or with the measured "
        "budget auto",
    )

    plain: bool = option(
        False,
        "a plan that a plain checkpoint can hold: one number of experts for all layers, as many as a token picks or "
        "more, merged only within the groups that a router picks among",
    )

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        self._check_reduce()
        for name, registry in REGISTRIES.items():
            if name != "saliency" or self.saliency is not None:
                registry.check(getattr(self, name))
        check_fields(self)
        if self.reference not in REFERENCES:
            raise ValueError(unknown("reference", self.reference, list(REFERENCES)))
        if self.router not in ROUTERS:
            raise ValueError(unknown("router", self.router, list(ROUTERS)))
        self._check_pruned_router()
        self._check_plain()
        is_share = isinstance(self.experts, float)
        if not 0 < self.experts <= 1 if is_share else self.experts < 1:
            raise ValueError(
                f"experts={self.experts!r} must be a whole number of experts per layer (8) or a share in (0, 1] (0.5)."
            )
        if self.capacity is not None:
            self._check_capacity()
        if self.min_experts < 1:
            raise ValueError(
                f"min_experts={self.min_experts!r} must be at least 1 and whole: a layer needs an expert."
            )

    def _check_reduce(self) -> None:
        if self.reduce not in (*REDUCTIONS, AUTO):
            raise ValueError(unknown("reduce", self.reduce, [*REDUCTIONS, AUTO]))
        if self.reduce == AUTO and self.budget != MEASURED:
            raise ValueError(
                f"reduce={AUTO!r} is for the measured effect to say: choose budget={MEASURED!r} or a size with it, or "
                f"{' or '.join(map(repr, REDUCTIONS))}."
            )

    def _check_plain(self) -> None:
        if self.plain and self.budget != UNIFORM:
            raise ValueError(
                f"budget={self.budget!r} gives layers unlike numbers of experts, and a plain checkpoint has one for "
                f"all: choose budget={UNIFORM!r}."
            )
        if self.plain and (self.skip or self.pruned_router != SLICE):
            name = "skip" if self.skip else "pruned_router"
            raise ValueError(
                f"{name}={vars(self)[name]!r} leaves layers or routers that a plain checkpoint cannot hold: leave it "
                "out."
            )

    def _check_pruned_router(self) -> None:
        if self.pruned_router not in PRUNED_ROUTERS:
            raise ValueError(unknown("pruned_router", self.pruned_router, list(PRUNED_ROUTERS)))
        if self.pruned_router == SLICE:
            return
        if self.budget == MEASURED or self.selection == "exhaustive":
            name = "budget" if self.budget == MEASURED else "selection"
            raise ValueError(
                f"pruned_router={self.pruned_router!r} keeps the rows of experts that are pruned, and "
                f"{name}={getattr(self, name)!r} judges routers that are cut: choose another, or "
                f"pruned_router={SLICE!r}."
            )

    def _check_capacity(self) -> None:
        if self.capacity < 1 or (isinstance(self.grouping, str) and self.grouping not in CAPPED):  # type: ignore[operator]
            raise ValueError(
                f"capacity={self.capacity!r} must be at least 1, and is for the groupings {' and '.join(CAPPED)}, not "
                f"for {self.grouping!r}: leave it out or choose one of these."
            )

    def least(self, num_experts: int) -> int:
        """Return how few of a layer's experts may stay, or groups, which have a capacity where one is given."""
        return max(self.min_experts, -(-num_experts // self.capacity) if self.capacity else 1)

    def resolved(self) -> Self:
        """Return the same with a saliency: where none was chosen, the one that goes with the reduction."""
        return self if self.saliency is not None else replace(self, saliency=DEFAULT_SALIENCY[self.reduce])

    @property
    def cuts_router(self) -> bool:
        """Whether routers are left with a row for each expert that is."""
        return self.pruned_router == SLICE if self.reduce == "prune" else self.router != MAP

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the methods read, to be passed to `collect_statistics`."""
        stages = ("budget", "saliency", "selection") if self.reduce == "prune" else tuple(REGISTRIES)
        methods = self.resolved()
        needs = [name for stage in stages for name in REGISTRIES[stage].needs(getattr(methods, stage))]
        rows = ["counts"] if self.plain and not self.cuts_router else []  # which weight the rows of a plain router
        return tuple(with_tokens([*needs, *constant_needs(self.pruned_router), *rows]))


def constant_needs(pruned_router: str) -> list[str]:
    """Return the statistics that the outputs of pruned experts are taken from."""
    return ["output_sum", "counts"] if pruned_router == CONSTANT else []


def option_help(name: str, config: type = MergeConfig) -> str:
    """Return the description of an option of `MergeConfig`, or of another class of options."""
    return next(help_of(item) for item in fields(config) if item.name == name)
