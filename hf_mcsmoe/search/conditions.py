"""What curves were measured with, and whether that is what is asked for now."""

from typing import Any

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import REGISTRIES, MergeConfig
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.choices import ranks
from hf_mcsmoe.search.config import NOTHING, SizeConfig
from hf_mcsmoe.search.curves import reduced_by

# Options that make another group, or another expert of it; to prune there are no groups.
STAGES = {
    "merge": (*(stage for stage in REGISTRIES if stage != "budget"), "reference", "router", "capacity"),
    "prune": ("saliency", "selection"),
}
# What files do not tell that were written before there was a choice.
BEFORE: dict[str, Any] = {"matrices alike": False} | {
    f"{stage} to {reduce}": str(getattr(MergeConfig(), stage))
    for reduce, stage in (("merge", "router"), ("merge", "capacity"), ("prune", "selection"))
}
REPAIR = ("method", "ridges", "elsewhere", "caution")
WAY_OUT = (
    "ask for the same again, or have it measured anew: on the command line name another --scores file, in Python "
    "empty `curves` of the statistics."
)


def conditions(merge: MergeConfig, search: SizeConfig, repair: RepairConfig) -> dict[str, Any]:
    """Return what curves depend on besides the model and the data, as JSON values by words for it."""
    told: dict[str, Any] = {"bits": sorted(search.bits), "group_size": search.group_size}
    told |= {"min_experts": search.min_experts, "reduce": list(search.reductions)}
    told |= {"matrices alike": search.alike != NOTHING}
    for reduce in search.reductions:
        own = reduced_by(merge, reduce).to_dict()
        told |= {f"{stage} to {reduce}": str(own[stage]) for stage in STAGES[reduce]}
    return told | {f"repair's {name}": repair.to_dict()[name] for name in REPAIR}


def check_curves(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig, repair: RepairConfig
) -> None:
    """Check that curves, where there are any, tell of what may be chosen.

    Raises:
        ValueError: they lack a layer, or were measured with other options.
    """
    if not statistics.curves:
        return
    for shared in layers.selected(merge.skip).tied:
        first = shared[0]
        if first.name not in statistics.curves:
            raise ValueError(f"What choices cost was not measured of the layer {first.name}: {WAY_OUT}")
    for name, asked in conditions(merge, search, repair).items():
        held = statistics.conditions.get(name, BEFORE.get(name))
        if not _covers(name, held, asked):
            raise ValueError(f"What choices cost was measured with {name} {held!r}, not {asked!r}: {WAY_OUT}")
    for shared in layers.selected(merge.skip).tied:
        known = ranks(shared, search) if len(shared) == 1 else ()
        if lacking := set(known) - statistics.curves[shared[0].name].low_rank.keys():
            name = shared[0].name
            raise ValueError(f"What rank={min(lacking)} costs was not measured of the layer {name}: {WAY_OUT}")


def covered(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, search: SizeConfig, repair: RepairConfig
) -> bool:
    """Tell whether statistics have curves, and these tell of what may be chosen."""
    try:
        check_curves(layers, statistics, merge, search, repair)
    except ValueError:
        return False
    return bool(statistics.curves)


def _covers(name: str, held: Any, asked: Any) -> bool:
    """Tell whether what was measured holds what is asked for."""
    if name in ("bits", "reduce"):
        return isinstance(held, list) and set(asked) <= set(held)
    return isinstance(held, int) and held <= asked if name == "min_experts" else held == asked
