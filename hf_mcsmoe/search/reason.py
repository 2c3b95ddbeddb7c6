"""Why a choice is what it is, in a sentence: what its curves say of fewer experts and of few bits."""

from collections.abc import Iterable, Mapping, Sequence

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.methods.choice import REDUCTIONS, Choice
from hf_mcsmoe.search.size import bytes_text

DONE_BY = {"merge": "merging", "prune": "pruning"}
# The bits that curves are asked about, where they were measured.
USUAL_BITS = 4


def reason(curves: Mapping[str, LayerCurves], choices: Mapping[str, Choice], limit: int, planned: int) -> str:
    """Return what halving all experts and storing them in 4 bits would cost in KL, and what was chosen.

    Args:
        limit, planned: bytes that were asked for, and that were found; a sentence more where they are far apart.
    """
    costs = [cost for cost in (_halved(list(curves.values())), _rounded(list(curves.values()))) if cost]
    measured = f"by the curves measured, {' and '.join(costs)}; therefore " if costs else ""
    text = f"{measured}{_chosen(curves, choices)}."
    text = text[0].upper() + text[1:]
    if planned >= 0.98 * limit:
        return text
    return f"{text} No candidate comes nearer to {bytes_text(limit)} than {bytes_text(planned)}."


def _halved(curves: Sequence[LayerCurves]) -> str:
    many = [item for item in curves if item.experts > 1]
    known = [name for name in REDUCTIONS if many and all(item.reduced.get(name) for item in many)]
    if not known:
        return ""
    costs = {name: sum(item.reduction_effect(name, item.experts // 2) for item in many) for name in known}
    best = min(costs, key=lambda name: costs[name])
    return f"halving the experts by {DONE_BY[best]} would cost {costs[best]:.2g} of KL"


def _rounded(curves: Sequence[LayerCurves]) -> str:
    sides = [side for item in curves for side in (item.w_in, item.w_out)]
    usual = [[part.effect for grid, part in side.items() if grid.bits == USUAL_BITS] for side in sides]
    if not usual or not all(usual):
        return ""
    return f"{USUAL_BITS} bits {sum(map(min, usual)):.2g}"


def _chosen(curves: Mapping[str, LayerCurves], choices: Mapping[str, Choice]) -> str:
    before = _range(curves[name].experts for name in choices)
    grids = [grid for choice in choices.values() for grid in (choice.w_in, choice.w_out)]
    bits = [grid.bits for grid in grids if grid]
    stored = f"in {_range(bits)} bits" if bits else "in the values they have"
    partly = " (some layers as they are)" if bits and len(bits) < len(grids) else ""
    ranks = [choice.rank for choice in choices.values() if choice.rank]
    of_rank = f", {'' if len(ranks) == len(choices) else 'partly '}of rank {_range(ranks)} + sparse" if ranks else ""
    return (
        f"{_range(choice.experts for choice in choices.values())} of {before} experts a layer, "
        f"{stored}{partly}{of_rank}"
    )


def _range(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
