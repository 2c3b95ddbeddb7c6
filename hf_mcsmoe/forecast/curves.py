"""What measuring choices executes, counted from sizes alone: fits, roundings, alignments and forwards of the probe.

Each layer is tried with fewer experts, in few bits and of low rank, each time fitted anew (see `search.bench`).
"""

from collections.abc import Iterator
from dataclasses import replace

from hf_mcsmoe.calibration.inputs import HOLD_OUT
from hf_mcsmoe.forecast.fitting import FITTED, Rows, Work, joint_work
from hf_mcsmoe.forecast.needs import Run
from hf_mcsmoe.forecast.sizes import Sizes
from hf_mcsmoe.search.choices import RANKS
from hf_mcsmoe.search.curves import SHARES
from hf_mcsmoe.search.probe import TOKENS

# Ridges that a joint fit tries of those near to the one that the first has chosen.
NEAR = 2
# Trials of each way to fewer experts, and of each number of bits and each rank at most, that the probe passes.
PROBED, PROBED_BITS, PROBED_RANK = 3, 2, 3
# Copies of each weight, in float32, that take as long as its rounding beside products: scales are searched, and
# columns make up for each other.
PASSES = 250


def curves_work(sizes: Sizes, run: Run) -> Work:
    """Return what fits and roundings of all trials execute, of all layers."""
    return sum(_tried(sizes, run), Work()).times(sizes.layers)


def _tried(sizes: Sizes, run: Run) -> Iterator[Work]:
    if not run.measures:
        return
    whole = _rows(sizes, run, sizes.num_experts)
    yield Work(experts=whole.tokens * sizes.top_k * whole.whole)  # what the original gives
    for number, count in enumerate(fits(sizes, run)):
        rows = _rows(sizes, run, count)
        yield _fitted(rows, run.repair, number)
        yield Work(single=rows.judged(1) * rows.whole)
    yield Work(single=2 * run.bits * whole.judged(1) * whole.whole)
    yield rounding_work(sizes, sizes.num_experts).times(run.bits)
    for part in RANKS[: run.ranks]:
        rank = min(sizes.hidden_size, sizes.intermediate_size) // part
        yield _factors_work(sizes, rank).times(run.bits)


def fits(sizes: Sizes, run: Run) -> list[int]:
    """Return the experts that there are at each fit: of a layer as it is for W_in in few bits, and for each rank."""
    whole = bool(run.bits) + run.ranks * (1 + run.bits)
    return fewer(sizes) * run.reductions + [sizes.num_experts] * whole


def fewer(sizes: Sizes) -> list[int]:
    """Return the numbers of experts that a layer is tried with; a token's picks must find as many."""
    return sorted({max(sizes.top_k, round(share * sizes.num_experts)) for share in SHARES} - {sizes.num_experts})


def alignments(sizes: Sizes, run: Run) -> int:
    """Return how many experts are aligned for trials of all layers: in one of the ways to fewer experts."""
    return sizes.layers * sum(sizes.num_experts - count for count in fewer(sizes)) if run.reductions else 0


def probed_tokens(sizes: Sizes, run: Run) -> int:
    """Return how many tokens pass the model for trials, those that the original passes first included."""
    if not run.measures:
        return 0
    trials = min(PROBED, len(fewer(sizes))) * run.reductions + 2 * min(PROBED_BITS, run.bits)
    trials += min(PROBED_RANK, run.bits + 1) * run.ranks
    return min(TOKENS, judging_rows(run) * run.length) * (1 + trials * sizes.layers)


def judging_rows(run: Run) -> int:
    """Return the rows that judge a fit."""
    return max(1, (run.rows - run.judged) // HOLD_OUT)


def rounding_work(sizes: Sizes, experts: int) -> Work:
    """Return what rounding the matrices of so many experts once executes."""
    width, hidden_size = sizes.intermediate_size, sizes.hidden_size
    weights = sizes.experts / sizes.itemsize / sizes.num_experts
    first = (weights - width * hidden_size) / hidden_size  # rows of W_in
    one = _rounded(first, hidden_size) + _rounded(hidden_size, width)
    return one.times(experts)


def _factors_work(sizes: Sizes, rank: int) -> Work:
    """Return what rounding U, V and the few rows of S of all experts executes, for both matrices."""
    one = _rounded(2 * rank, sizes.hidden_size).times(2) + _rounded(sizes.hidden_size, rank).times(2)
    return (one + _rounded(rank, sizes.intermediate_size)).times(sizes.num_experts)


def _rounded(out: float, width: int) -> Work:
    """Return what rounding a matrix [out, width] executes: factors of its inputs' moments, and two errors of rows."""
    return Work(double=8 / 3 * width**3 + 4 * out * width**2, single=out * width**2, moved=4 * PASSES * out * width)


def _rows(sizes: Sizes, run: Run, kept: int) -> Rows:
    """Return the rows of a trial, for which none are made."""
    rows = Rows.of(sizes, run, kept)
    tokens = (run.rows - run.judged) * run.length
    return replace(rows, tokens=tokens, seen=rows.seen * tokens / rows.tokens)


def _fitted(rows: Rows, repair: str, number: int) -> Work:
    if repair == "joint" and number:
        return joint_work(rows, tried=NEAR, trials=1, final=False)
    return FITTED[repair](rows) if repair in FITTED else Work()
