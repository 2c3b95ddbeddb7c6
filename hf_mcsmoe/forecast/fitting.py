"""What fitting merged layers executes, counted from sizes alone: operations by kind, which take unlike time.

Letters as elsewhere, with G stored experts of E, and N = G F hidden units of all of them. Routing is taken to be even.
What no size tells is said by the constants: how many ridges are tried before one does worse, and how many steps
conjugate gradients take. They were set on runs of examples/benchmarks/plan_accuracy.py.
"""

from dataclasses import dataclass, fields

from hf_mcsmoe.calibration.inputs import HOLD_OUT, MEMORY_LIMIT
from hf_mcsmoe.forecast.needs import Run
from hf_mcsmoe.forecast.sizes import Sizes
from hf_mcsmoe.repair.elsewhere import MOST_MEMBERS, MOST_ROWS
from hf_mcsmoe.repair.methods import JUDGE_EVERY, RepairConfig

# The repair by default, whose numbers count, and its ridges.
USUAL = RepairConfig()
RIDGES = len(USUAL.ridges)
# Trials of a ridge: held-out tokens, and without the calibration's data set or the made rows one each.
TRIALS = 3
# Ridges that a joint fit tries of them, and steps of conjugate gradients for each.
TRIED, STEPS = 3, 30
# What a step of training does to each number that it trains, and to each of the states on the way, takes as long as
# so many copies of it into new memory, in float32.
ADAM, STATES = 2, 1.5


@dataclass(frozen=True)
class Work:
    """Operations: of `experts` in the model's dtype, of products in `single` and `double` precision.

    And `decompositions` of symmetric matrices [F, F] in float64, and bytes that are `moved` by element-wise work.
    """

    experts: float = 0.0
    single: float = 0.0
    double: float = 0.0
    decompositions: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def times(self, number: float) -> "Work":
        """Return so much more of it."""
        return Work(*(getattr(self, one.name) * number for one in fields(self)))


@dataclass(frozen=True)
class Rows:
    """What a layer of G `kept` experts is fitted to.

    `tokens` T, of which `judging` are held out; `seen` rows of all stored experts, where picks of one token that fall
    on the same count once; `added` rows of each that are routed elsewhere, for which so many members are `asked`.
    """

    sizes: Sizes
    kept: int
    tokens: float
    judging: float
    seen: float
    added: float
    asked: float

    @classmethod
    def of(cls, sizes: Sizes, run: Run, kept: int) -> "Rows":
        """Return the rows of a layer."""
        given = run.rows - run.judged
        judges = max(1, given // HOLD_OUT)
        tokens, judging = (2 * given - judges) * run.length, judges * run.length
        share = 1 - (1 - 1 / kept) ** sizes.top_k  # of tokens, that an expert sees
        most = min(MOST_ROWS, 2 * sizes.intermediate_size, (tokens - judging) * (1 - share))
        asked = min(MOST_MEMBERS, sizes.num_experts / kept)
        return cls(sizes, kept, tokens, judging, tokens * share * kept, most, asked)

    @property
    def all(self) -> float:
        """Rows of all experts."""
        return self.seen + self.kept * self.added

    def judged(self, trials: int) -> float:
        """Return the rows of all experts that judge, in all trials together: those held out, or in the end all."""
        return self.all if trials > 1 else self.seen * self.judging / self.tokens

    @property
    def output(self) -> float:
        """Operations of a row in an output matrix."""
        return 2.0 * self.sizes.hidden_size * self.sizes.intermediate_size

    @property
    def whole(self) -> float:
        """Operations of a row in an expert."""
        return 2.0 * self.sizes.experts / self.sizes.itemsize / self.sizes.num_experts

    @property
    def targets(self) -> float:
        """Operations of the original for what a layer's rows should become."""
        picks = self.tokens * self.sizes.top_k + self.kept * self.added * self.asked
        return picks * self.whole

    @property
    def hidden(self) -> float:
        """Operations of the hidden units of all rows."""
        return self.all * (self.whole - self.output)


def work_of(sizes: Sizes, run: Run) -> Work:
    """Return what the repair of all layers executes."""
    if run.repair not in FITTED:
        return Work()
    return FITTED[run.repair](Rows.of(sizes, run, run.kept)).times(sizes.layers)


def refit_work(rows: Rows) -> Work:
    """Return what `refit` executes, each expert by itself: its normal equations, and ridges in three trials."""
    width, square = rows.sizes.intermediate_size, rows.output * rows.sizes.intermediate_size
    around = Work(experts=2 * rows.targets + 2 * rows.hidden)
    if 8 * (6 + TRIALS) * width**2 > MEMORY_LIMIT:
        return around + _wide(rows)
    sums = rows.all * (2 * width**2 + rows.output)
    solved = (TRIALS * (3 + 2 * RIDGES) + 4) * square
    return around + Work(double=sums + rows.kept * solved, decompositions=rows.kept * (TRIALS + 1))


def _wide(rows: Rows) -> Work:
    """Return what it executes without a matrix [F, F]: over tokens where they are few, else by conjugate gradients."""
    number, width = rows.all / rows.kept, rows.sizes.intermediate_size
    again = Work(experts=TRIALS * rows.hidden, double=(RIDGES + 1) * rows.judged(TRIALS) * rows.output)
    if 2 * 8 * number * (2 * width + 6 * number) <= MEMORY_LIMIT:
        one = number * (4 * number * width + 2 * number * rows.sizes.hidden_size + (RIDGES + 1) * rows.output)
        solved = Work(double=rows.kept * one, decompositions=rows.kept * (number / width) ** 3)
        return again + solved.times(TRIALS + 1)
    steps = Work(experts=STEPS * rows.hidden, double=2 * STEPS * rows.all * rows.output)
    return again + steps.times(TRIALS * RIDGES + 1)


def joint_work(rows: Rows, *, tried: int = TRIED, trials: int = TRIALS, final: bool = True) -> Work:
    """Return what a joint fit executes: normal equations of all experts, or conjugate gradients where they are many.

    Args:
        tried: ridges, in each of the trials.
        final: whether the weights are then fitted to the held-out tokens too.
    """
    hidden_size, width = rows.sizes.hidden_size, rows.sizes.intermediate_size
    units = rows.kept * width
    times = 1 if 4 * rows.all * width <= MEMORY_LIMIT // 2 else 4  # that hidden units are computed
    around = Work(experts=rows.targets + times * rows.hidden, single=rows.all * rows.output)
    judged = Work(single=tried * rows.judged(trials) * rows.output)
    if 4 * 8 * units**2 <= MEMORY_LIMIT:
        picks = rows.seen / rows.tokens
        gram = (rows.tokens * picks * (picks + 1) / 2 + rows.kept * rows.added) * 2 * width**2
        solved = units**3 / 3 + 2 * units**2 * hidden_size
        sums = Work(single=(1 + (trials > 1)) * (gram + rows.all * rows.output), moved=trials * 16 * units**2)
        ridges = Work(single=trials * tried * solved, double=solved * final)
        return around + judged + sums + ridges
    sums = Work(single=rows.all * (2 * width**2 + rows.output))
    step = Work(single=2 * rows.all * rows.output + rows.kept * width * rows.output)
    ridge = step.times(STEPS) + Work(double=rows.kept * width**3 / 3)
    return around + judged + sums.times(trials + final) + ridge.times(trials * tried + final)


def local_work(rows: Rows, *, tried: int = TRIED, steps: int = USUAL.steps) -> Work:
    """Return what training all weights of a layer executes, from a joint fit on; what is between products moves."""
    fitted = rows.tokens - rows.judging
    picks = (fitted * rows.seen / rows.tokens + rows.kept * rows.added) / (fitted + rows.kept * rows.added)
    through = steps * USUAL.batch_tokens * picks
    states = through * (2 * rows.sizes.hidden_size + 4 * rows.sizes.intermediate_size)
    trained = Work(
        experts=rows.targets - rows.tokens * rows.sizes.top_k * rows.whole,
        single=3 * through * rows.whole,
        moved=4 * STATES * states + 4 * ADAM * steps * rows.kept * rows.whole / 2,
    )
    judged = Work(single=(2 + -(-steps // JUDGE_EVERY)) * rows.judged(1) * rows.whole)
    return joint_work(rows, tried=tried, final=False) + trained + judged


FITTED = {"refit": refit_work, "joint": joint_work, "local": local_work}
