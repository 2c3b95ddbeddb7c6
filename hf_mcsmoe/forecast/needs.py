"""What a compression takes in memory, on disk and in bytes read: a sum of named parts for each of its phases."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_mcsmoe.calibration.inputs import HOLD_OUT, MEMORY_LIMIT
from hf_mcsmoe.evaluation.held_out import MEMORY_LIMIT as JUDGED
from hf_mcsmoe.forecast.sizes import Sizes
from hf_mcsmoe.repair.elsewhere import MOST_ROWS
from hf_mcsmoe.search.probe import MEMORY_LIMIT as PROBED
from hf_mcsmoe.search.probe import TOKENS

# What a process that has imported the package holds, and what kernels and the heap add once it works (measured).
BASE, WORKING = 520_000_000, 90_000_000
# Copies of what is joined while it is made: stacks of what was read, and the weight itself.
COPIES = 2
IN_MEMORY, STREAMED = "in memory", "streamed"


@dataclass(frozen=True)
class Run:
    """A compression as far as memory depends on it.

    `rows` of `length` tokens in batches of `batch_size`, of which `judged` rows are held out; `result` bytes as saved,
    `merged` bytes of all layers' experts when they are merged and not yet in few bits, `kept` experts of a layer;
    `repair` by method, "none" for none; whether something inside experts goes (`sparse`), experts are `aligned`, and
    the original is used up (`consume`); `sums` bytes of statistics; `threads` that solve assignments;
    `hidden_limit` bytes of hidden states in memory; `tried` results that are there side by side; `plans` that a
    measured budget compares, of which some may be `cut`, with routers of fewer rows; `sweeps` over the source, and
    `copies` bytes of trials on disk, where it is read block by block; whether statistics read `gradients`, for which
    the source is read back as well. Where what choices cost is measured, it is of so many ways to fewer experts
    (`reductions`), numbers of `bits`, and `ranks`.
    """

    result: int
    merged: int
    kept: int
    rows: int = 256
    judged: int = 32
    length: int = 512
    batch_size: int = 8
    repair: str = "none"
    sparse: bool = False
    aligned: bool = True
    consume: bool = False
    sums: int = 0
    threads: int = 1
    hidden_limit: int | None = None
    tried: int = 1
    plans: int = 0
    cut: bool = False
    sweeps: int = 2
    copies: int = 0
    gradients: bool = False
    reductions: int = 0
    bits: int = 0
    ranks: int = 0

    @property
    def measures(self) -> bool:
        """Whether what choices cost is measured."""
        return bool(self.reductions or self.bits or self.ranks)

    @property
    def fitted(self) -> int:
        """The tokens that a fit sees: those of the calibration, and as many of made rows where there is a repair."""
        return (self.rows - self.judged) * self.length * (1 if self.repair == "none" else 2)

    @property
    def waiting(self) -> int:
        """The tokens whose hidden states wait at a block: those of a fit, and in each model those that are judged.

        What is left out inside experts is chosen by what they see: those of a fit pass in one model more.
        """
        models = (2 if self.repair == "none" else 3) + self.sparse
        return self.fitted * (1 + self.sparse) + self.judged * self.length * models

    def waiting_back(self, blocks: int) -> int:
        """The tokens whose hidden states wait for gradients, those at each of some blocks, and gradients at two."""
        return (blocks + 2) * (self.rows - self.judged) * self.length if self.gradients else 0


@dataclass(frozen=True)
class Needs:
    """What one way of a run takes: bytes of memory by phase and part, bytes on disk and read."""

    phases: Mapping[str, Mapping[str, int]]
    disk: int
    read: int

    @property
    def peak(self) -> str:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def memory(self) -> int:
        """Bytes resident at most, pages of mapped files among them."""
        return sum(self.phases[self.peak].values())

    @property
    def needed(self) -> int:
        """Bytes of memory without which it does not work: what a file maps can be read again."""
        return max(sum(parts.values()) - parts.get("mapped files", 0) for parts in self.phases.values())


def needs_of(sizes: Sizes, run: Run, stored: int, *, base: int = BASE) -> dict[str, Needs]:
    """Return what a run takes by way: in memory, and streamed from folder to folder.

    Args:
        stored: bytes of the source's weight files.
        base: bytes that the process holds before it does anything.
    """
    kept = _streams(run) * _waiting(sizes, run)  # hidden states, from which a run that was killed goes on
    disk = max(run.tried * run.result, run.copies) + kept  # copies are gone before the first shard is written
    disk = max(disk, _waiting_back(sizes, run))  # and so are those that wait for gradients
    return {
        IN_MEMORY: Needs(_in_memory(sizes, run, stored, base + WORKING), run.result, stored),
        STREAMED: Needs(_streamed(sizes, run, base + WORKING), disk, run.sweeps * stored),
    }


def _in_memory(sizes: Sizes, run: Run, stored: int, base: int) -> dict[str, dict[str, int]]:
    """Return the parts of each phase where the model is loaded.

    Files are mapped until all weights are made of them, or copied. The largest that is made takes more once, while
    those that are copied, and the pages of these, are not there yet.
    """
    copied = sizes.weights - sizes.converted
    held = {"process": base, "weights": sizes.weights}
    result = {} if run.consume else {"result": sizes.weights - sizes.experts * sizes.layers + run.merged}
    if run.tried > 1:
        result["results before"] = (run.tried - 1) * run.result
    graph = {"gradients": sizes.layers * (sizes.experts + _picks(sizes, run))} if run.gradients else {}
    own = {"merged layers": run.merged // sizes.layers} if run.consume else {}  # others are freed layer by layer
    phases = {
        "loading": held | {"mapped files": stored, "conversion": max(0, sizes.joined - 2 * copied)},
        "statistics": held | {"sums": run.sums} | _flight(sizes, run) | _judged(sizes, run) | graph,
        "merging": held | {"sums": run.sums} | result | own | _alignment(sizes, run) | _judged(sizes, run),
        "saving": held | result | _judged(sizes, run),
    }
    if run.repair != "none":
        seen = min(MEMORY_LIMIT, sizes.layers * _inputs(sizes, run)) + _inputs(sizes, run)
        fit = {"inputs of layers": seen} | _equations(sizes, run) | _judged(sizes, run)
        phases["repair"] = held | {"sums": run.sums} | result | fit
    if run.plans:  # what was made of one stays until the next is made
        several = min(run.plans, 2) * (sizes.weights - sizes.experts * sizes.layers + run.merged)
        phases["comparing"] = held | {"sums": run.sums, "results compared": several} | _judged(sizes, run)
    if run.measures:
        given = min(MEMORY_LIMIT, sizes.layers * _seen(sizes, run)) + _seen(sizes, run)
        phases["curves"] = held | {"sums": run.sums, "inputs of layers": given} | _tried(sizes, run)
    return phases


def _streamed(sizes: Sizes, run: Run, base: int) -> dict[str, dict[str, int]]:
    """Return the parts of each phase where one block is in memory."""
    held = {"process": base, "outside the blocks": sizes.outside, "sums": run.sums}
    hidden = _hidden(sizes, run)
    merged = {"merged layer": run.merged // sizes.layers}
    block, seen, several = {"block": sizes.block}, {"hidden states": hidden}, {"hidden states": _streams(run) * hidden}
    all_seen = _waiting_back(sizes, run) if run.hidden_limit is None else 0
    back = {"gradients": sizes.experts, "hidden states": max(hidden, all_seen)} if run.gradients else {}
    phases = {
        "loading": held | block | {"conversion": _conversion(sizes)} | several,
        "statistics": held | block | seen | _flight(sizes, run) | back,
        "merging": held | block | several | merged | _alignment(sizes, run),
        "writing": held | {"shard": max(sizes.outside, sizes.block - sizes.experts + run.merged // sizes.layers)},
    }
    if run.repair != "none":
        fit = {"inputs of layers": 2 * _inputs(sizes, run)} | _equations(sizes, run) | _judged(sizes, run)
        phases["repair"] = held | block | several | merged | fit
    if run.measures:
        phases["curves"] = held | block | seen | {"inputs of layers": 2 * _seen(sizes, run)} | _tried(sizes, run)
    return phases


def _conversion(sizes: Sizes) -> int:
    """Return the bytes that making a block's weights takes beside the block.

    While the largest weight is joined, the others of the block's experts are not there yet.
    """
    return max(0, COPIES * sizes.joined - sizes.experts) if sizes.joined else 0


def _hidden(sizes: Sizes, run: Run) -> int:
    """Return the bytes of hidden states [rows, T, D] that wait between blocks, and of their masks [rows, T, T]."""
    total = _waiting(sizes, run)
    return total if run.hidden_limit is None else min(total, run.hidden_limit)


def _waiting(sizes: Sizes, run: Run) -> int:
    return run.rows * run.length * (sizes.hidden_size * sizes.itemsize + run.length)


def _waiting_back(sizes: Sizes, run: Run) -> int:
    return run.waiting_back(sizes.block_count) * sizes.hidden_size * sizes.itemsize


def _streams(run: Run) -> int:
    """Return of how many models the hidden states of all rows wait side by side.

    They are the original and, with a repair, the merged and the repaired one, and one more where something is left out
    inside experts; or the original and the results that are compared, of which only rows that judge pass, a fifth,
    unless some are cut, which are fitted to what they see.
    """
    compared = run.plans if run.cut else -(-run.plans // HOLD_OUT)
    return max((1 if run.repair == "none" else 3) + run.sparse, 1 + compared)


def _flight(sizes: Sizes, run: Run) -> dict[str, int]:
    """Return what a batch in flight takes: its picks in the experts, and its logits with a copy in float32."""
    logits = run.batch_size * run.length * sizes.vocabulary * (sizes.itemsize + 4)
    return {"experts at work": _picks(sizes, run), "logits": logits}


def _picks(sizes: Sizes, run: Run) -> int:
    """Return the bytes of what the experts of a layer make of a batch."""
    width = 2 * sizes.hidden_size + 4 * sizes.intermediate_size
    return run.batch_size * run.length * sizes.top_k * width * sizes.itemsize


def _judged(sizes: Sizes, run: Run) -> dict[str, int]:
    """Return the bytes of the original's distributions [positions, V] in float32."""
    kept = min(JUDGED, 4 * run.judged * run.length * sizes.vocabulary)
    return {"distributions": kept} if kept else {}


def _alignment(sizes: Sizes, run: Run) -> dict[str, int]:
    """Return the bytes of costs [F, F], in float32 and once more in float64, of assignments solved side by side."""
    if not run.aligned or run.kept >= sizes.num_experts:
        return {}
    one = 12 * sizes.intermediate_size**2
    return {"alignment": one * max(1, min(run.threads, sizes.experts // max(1, one)))}


def _tried(sizes: Sizes, run: Run) -> dict[str, int]:
    """Return the bytes of what is tried of one layer, all experts first, and of the rows that judge it.

    Of what is rounded there is what it was; and of as many experts as memory holds, moments of their inputs and copies
    of weights, see `quantization.layer`.
    """
    tokens, width = (run.rows - run.judged) * run.length, max(sizes.hidden_size, sizes.intermediate_size)
    parts = {"experts tried": sizes.experts * (2 if run.bits else 1), "targets": 8 * tokens * sizes.hidden_size}
    if run.repair != "none":
        whole = _equations(sizes, replace(run, kept=sizes.num_experts))
        parts |= {name: size for name, size in whole.items() if name not in parts}
    if run.bits:  # when what was fitted before is gone
        one = 32 * width**2 + 64 * sizes.experts // (sizes.itemsize * sizes.num_experts)
        parts["rounding"] = max(0, min(MEMORY_LIMIT, sizes.num_experts * one) - parts.get("normal equations", 0))
    judging = min(TOKENS, max(1, tokens // HOLD_OUT))
    return parts | {"distributions": min(PROBED, 4 * judging * sizes.vocabulary)}


def _seen(sizes: Sizes, run: Run) -> int:
    """Return the bytes of what one layer's experts see of the calibration's rows."""
    return (run.rows - run.judged) * run.length * (sizes.hidden_size * sizes.itemsize + 12 * sizes.top_k)


def _inputs(sizes: Sizes, run: Run) -> int:
    """Return the bytes of what one layer's experts see: hidden states, picks and weights."""
    return run.fitted * (sizes.hidden_size * sizes.itemsize + 12 * sizes.top_k)


def _equations(sizes: Sizes, run: Run) -> dict[str, int]:
    """Return what fitting a layer takes: its rows, the solutions, and normal equations of one expert or, jointly, all.

    Rows beside the calibration's are those routed elsewhere: their inputs in three copies and targets in two. The
    solutions [D, F] of all experts are float64, and so are the equations: six matrices [F, F], jointly four, and four
    [D, F], or less where they do not fit.
    """
    added = run.kept * min(MOST_ROWS, 2 * sizes.intermediate_size)
    unknowns = sizes.intermediate_size * (run.kept if run.repair == "joint" else 1)
    square = 8 * unknowns**2 * (4 if run.repair == "joint" else 6)
    return {
        "targets": 4 * run.fitted * sizes.hidden_size,
        "rows routed elsewhere": added * sizes.hidden_size * (3 * sizes.itemsize + 8),
        "solutions": 8 * run.kept * sizes.hidden_size * sizes.intermediate_size,
        "normal equations": min(MEMORY_LIMIT, square + 32 * unknowns * sizes.hidden_size),
    }
