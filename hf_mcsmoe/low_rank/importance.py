"""How much each row of S means to the loss: importance of entries, averages over steps, scores of rows."""

from collections.abc import Callable, Iterator

import torch
from torch.distributed.tensor import DTensor

from hf_mcsmoe.layers.sharded import local
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.modeling.losparse_mcsmoe import SparsePart

IMPORTANCE = Registry("importance")
AGGREGATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda entries: entries.mean(-1),
    "sum": lambda entries: entries.sum(-1),
    "max": lambda entries: entries.amax(-1),
}
# Entries that the CPU works on at a time: they stay in its cache, where the whole of S would go through memory thrice.
CHUNK = 2**16
Scores = dict[str, torch.Tensor]


@IMPORTANCE.register("sensitivity", paper="2306.11222")
def sensitivity(weight: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Return `s * dL/ds` [n, in], whose absolute value counts (LoSparse, section 3.2); None without a gradient."""
    return None if gradient is None else weight * gradient


@IMPORTANCE.register("magnitude")
def magnitude(weight: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Return `s` [n, in], whose absolute value counts."""
    return weight


def row_scores(parts: dict[str, SparsePart], importance: str | Callable, aggregate: str = "mean") -> Scores:
    """Return the scores [*, out] of the rows of each S now; weights without a gradient are left out."""
    scores = {}
    for name, part in parts.items():
        chunks = [AGGREGATES[aggregate](entries) for _, entries in _chunks(part, importance)]
        if chunks:
            scores[name] = _of_rows(torch.cat(chunks), part)
    return scores


def _of_rows(scores: torch.Tensor, part: SparsePart) -> torch.Tensor:
    """Return the scores [*, out] of all rows of S from those of the rows that this process holds."""
    if not isinstance(part.weight, DTensor):
        return scores.view(part.kept.shape)
    own = scores.view(local(part.weight).shape[:-1])
    mesh, placements, shape = part.weight.device_mesh, part.weight.placements, part.kept.shape
    return DTensor.from_local(own, mesh, placements, shape=shape, stride=part.kept.stride()).full_tensor()


def _chunks(part: SparsePart, importance: str | Callable) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield some rows of S at a time, and the importance [n, in] of their entries in float32; nothing without one."""
    method, weight, gradient = IMPORTANCE[importance], local(part.weight.detach()), part.weight.grad
    width, gradient = weight.shape[-1], None if gradient is None else local(gradient)
    weight, gradient = weight.view(-1, width), None if gradient is None else gradient.reshape(-1, width)
    step = max(1, CHUNK // width) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        entries = method(weight[rows].float(), None if gradient is None else gradient[rows].float())
        if entries is None:
            return
        yield rows, entries.abs()


class RowAverages:
    """Scores of rows as exponential averages over steps, `beta * old + (1 - beta) * new`.

    Without `beta2` the average is kept per row. That equals averaging the entries where rows are means or sums; for
    max it is the average of the rows' maxima. With it the score of an entry is its average importance times its
    average uncertainty, `U = |I - average of I|` averaged with `beta2` (PLATON, arXiv 2206.12562): both are kept per
    entry, in float32, 8 bytes for each entry of S, and take several times as long.

    Values that are not finite (a step that a gradient scaler skips) change nothing.
    """

    def __init__(self, importance: str | Callable, aggregate: str, beta: float, beta2: float | None = None) -> None:
        """Start from zero; see `IMPORTANCE` and `AGGREGATES` for the names."""
        self.importance, self.aggregate, self.beta, self.beta2 = importance, aggregate, beta, beta2
        self.scores: Scores = {}
        self.entries: dict[str, torch.Tensor] = {}  # [2, rows, in] per weight: average importance and uncertainty

    def update(self, parts: dict[str, SparsePart]) -> None:
        """Take in the importance of now, of those weights that have a gradient."""
        if self.beta2 is not None:
            for name, part in parts.items():
                self._update_entries(name, part, self.beta2)
            return
        for name, new in row_scores(parts, self.importance, self.aggregate).items():
            old = self.scores.get(name, torch.zeros_like(new)).to(new.device)
            self.scores[name] = _average(old, new, self.beta)

    def _update_entries(self, name: str, part: SparsePart, beta2: float) -> None:
        weight, chunks = local(part.weight.detach()), []
        if name not in self.entries:
            shape = (2, weight.shape[:-1].numel(), weight.shape[-1])
            self.entries[name] = torch.zeros(shape, device=weight.device)
        importance, uncertainty = self.entries[name] = self.entries[name].to(weight.device)
        for rows, new in _chunks(part, self.importance):
            mean = _average(importance[rows], new, self.beta)
            spread = _average(uncertainty[rows], new.sub_(mean).abs_(), beta2)
            chunks.append(AGGREGATES[self.aggregate](mean * spread))
        if chunks:
            self.scores[name] = _of_rows(torch.cat(chunks), part)

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that the averages need to go on, by name, on the CPU."""
        tensors = {f"rows.{name}": value for name, value in self.scores.items()}
        tensors |= {f"entries.{name}": value for name, value in self.entries.items()}
        return {name: value.contiguous().cpu() for name, value in tensors.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state` returned."""
        found: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "entries": {}}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            found[kind][name] = value
        self.scores, self.entries = found["rows"], found["entries"]


def _average(old: torch.Tensor, new: torch.Tensor, beta: float) -> torch.Tensor:
    """Move `old`, in place, a share `1 - beta` of the way to `new` where that is finite; returns it."""
    return old.lerp_(torch.where(new.isfinite(), new, old), 1 - beta)
