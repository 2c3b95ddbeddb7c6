"""How long a run will take on a machine that was measured for some seconds: an estimate, by what it does."""

from hf_mcsmoe.forecast.curves import alignments, curves_work, judging_rows, probed_tokens, rounding_work
from hf_mcsmoe.forecast.figures import Figures
from hf_mcsmoe.forecast.fitting import Work, work_of
from hf_mcsmoe.forecast.machine import Pace
from hf_mcsmoe.forecast.needs import Needs, Run
from hf_mcsmoe.forecast.sizes import Sizes

# Growth of an assignment's time with the width: 7.4 s at 8192 for 2.0 s at 4096, unrelated neurons.
ASSIGNMENT = 1.9
# How many times each byte that is read goes through memory: stacked, checked, merged, hashed and written. Set on runs
# of examples/benchmarks/plan_accuracy.py.
HANDLED = 6


def seconds_of(sizes: Sizes, figures: Figures, run: Run, needs: Needs, pace: Pace) -> dict[str, float]:
    """Return the seconds of each part of a run that was estimated, none of which overlap.

    Forwards take two operations for each parameter that a token meets. There is one for the statistics and, with a
    repair, one of the original for what it is fitted to; what is judged passes each stage. Plans that are compared are
    made and fitted each, and so is each result that is tried for a size.
    """
    made = run.tried + run.plans  # models
    gone = made * max(0, sizes.num_experts - run.kept) * sizes.layers + alignments(sizes, run)
    assigned = pace.assignment * (sizes.intermediate_size / pace.width) ** ASSIGNMENT
    products = 4 * sizes.intermediate_size**2 * sizes.hidden_size / pace.products  # costs of one assignment
    rounded = rounding_work(sizes, run.kept).times(2 * sizes.layers * run.tried if run.bits else 0)
    return {
        "forwards": 2 * (figures.active - figures.embedding) * _passed(run, made) / pace.products,
        "handling": HANDLED * needs.read / pace.copying,
        "reading": needs.read / pace.reading,
        "writing": needs.disk / pace.reading,
        "aligning": gone * (assigned + products) / run.threads if run.aligned else 0.0,
        "fitting": _fitting(work_of(sizes, run).times(made) + rounded, sizes, pace),
        "curves": _fitting(curves_work(sizes, run), sizes, pace)
        + 2 * (figures.active - figures.embedding) * probed_tokens(sizes, run) / pace.products,
    }


def _passed(run: Run, made: int) -> int:
    """Return how many tokens pass a model, but for the probe's."""
    stages, compared = 2 if run.repair == "none" else 3, (1 + run.plans) * judging_rows(run) if run.plans else 0
    tokens = (run.rows + run.judged * stages + compared) * run.length
    return tokens + made * (run.fitted if run.repair != "none" else 0)


def _fitting(work: Work, sizes: Sizes, pace: Pace) -> float:
    """Return the seconds of fits."""
    products = work.experts / pace.products + work.single / pace.single + work.double / pace.double
    decomposed = pace.decomposition * (sizes.intermediate_size / pace.width) ** 3
    return products + work.decompositions * decomposed + work.moved / pace.copying
