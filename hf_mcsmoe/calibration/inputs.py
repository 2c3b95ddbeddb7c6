"""What the experts of a model see on calibration data, kept in memory a few layers at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from hf_mcsmoe.calibration.shares import Filler, own_batches
from hf_mcsmoe.data.domains import MADE, domains_of
from hf_mcsmoe.layers.batches import Batch, each, run_routed
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.processes import current

MEMORY_LIMIT = 2_000_000_000
# Every fifth sequence is held out.
HOLD_OUT = 5


@dataclass(frozen=True)
class LayerInputs:
    """The tokens that count of one layer, on the CPU: a row each, or where inputs are scaled (Llama 4) one per pick.

    `hidden` [T, D] inputs of the experts in the model's dtype; `index` int [T, K] the picked experts of the layer as
    it is, of a merged one the stored experts; `weights` [T, K], where a pick of weight 0 reached no expert; `held_out`
    bool [T], the tokens of whole sequences, about a fifth, that are to judge what the others fit; `domain` int [T],
    the number of the data set that a token is of, -1 where the batches do not say (see `DomainBatch`).
    """

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    held_out: torch.Tensor
    domain: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def mapped(self, expert_map: Sequence[int]) -> "LayerInputs":
        """Return the same tokens as picks of stored experts.

        Args:
            expert_map: int [E] -> [G], of the merged layer.
        """
        stored = torch.tensor([*expert_map, max(expert_map) + 1])
        return replace(self, index=stored[self.index])

    @property
    def domains(self) -> list[int]:
        """The data sets that there are tokens of, rising."""
        return self.domain.unique().tolist()

    def fitted(self) -> "LayerInputs":
        """Return the tokens that do not judge."""
        return LayerInputs(*(getattr(self, f.name)[~self.held_out] for f in fields(self)))

    def of_one_domain(self) -> "LayerInputs":
        """Return the tokens as of one data set."""
        return replace(self, domain=torch.zeros_like(self.domain))

    def __add__(self, other: "LayerInputs") -> "LayerInputs":
        """Return the tokens of both, as of two layers that share their experts."""
        return LayerInputs(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


def capture_inputs(layers: Sequence[MoELayer], batches: Iterable[Batch]) -> dict[str, LayerInputs]:
    """Run the model of `layers` once over `batches` and keep what their experts see, by the layers' names.

    Tokens count as for `collect_statistics`, but those that an expert's capacity turned away are kept, with weight 0.
    The model is left as it was. All of it is held in memory: for many layers use `stream_inputs`. Each of several
    processes runs a share of the batches, and all get all of it.

    Raises:
        ValueError: no batches, or activations that are not finite.
    """
    model, batches = layers[0].model, list(apart(layers[0].model, each(batches)))
    found = Captured([layer.name for layer in layers], batches)
    if (own := own_batches(model, batches)) is not None:
        run_routed(layers, own, found.keep)
    return {layer.name: found.joined(layer.name) for layer in layers}


class Captured:
    """What the experts of some layers see, batch after batch: the sink of a run."""

    def __init__(self, names: Sequence[str], batches: Sequence[Batch]) -> None:
        """Begin with nothing, for the layers called `names`; `batches` are all that will be run, in order."""
        self._before = [0, *accumulate(map(num_sequences, batches))]
        self._seen: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in names}

    def keep(self, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        """Keep one forward."""
        if isinstance(batch, Filler):
            return
        tokens, here = len(routed.logits), num_sequences(batch)
        sequence = torch.arange(tokens) * here // max(tokens, 1)
        if counted is not None:
            routed, sequence = routed.where(counted), sequence[counted.cpu()]
        rows = routed.per_input()
        sequence = sequence.repeat_interleave(len(rows.hidden) // max(len(sequence), 1))
        weights, processes = rows.weights.masked_fill(~rows.reached, 0), current()
        before = self._before[processes.rank + len(self._seen[layer.name]) * processes.size]
        tensors = rows.hidden, rows.index, weights, before + sequence, domains_of(batch, here)[sequence]
        self._seen[layer.name].append(tuple(tensor.to("cpu", copy=True) for tensor in tensors))

    def joined(self, name: str, number: int | None = None) -> LayerInputs:
        """Return what a layer saw in the first `number` batches; None for all.

        Raises:
            ValueError: no token that counts, or activations that are not finite.
        """
        parts, sequences = self._seen[name][:number], self._before[-1 if number is None else number]
        return _joined(name, current().joined(parts), sequences)


def num_sequences(batch: Batch) -> int:
    """Return how many texts a batch has: the length of its first tensor of at least two dimensions, else 1."""
    sizes = [len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
    return sizes[0] if sizes else 1


def _joined(name: str, parts: list[tuple[torch.Tensor, ...]], sequences: int) -> LayerInputs:
    if not any(len(part[0]) for part in parts):
        raise ValueError(f"No token of the calibration set that counts reaches {name}.")
    hidden, index, weights, sequence, domain = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if not (hidden.isfinite().all() and weights.isfinite().all()):
        raise ValueError(f"The inputs of {name} are not finite: the model holds NaN or overflows.")
    real, held_out = domain != MADE, torch.zeros(len(domain), dtype=torch.bool)
    if not real.all():  # made rows follow the others
        sequences = int(sequence[~real].min())
    if real.any():
        held_out[real] = held_out_tokens(sequence[real], sequences)
    return LayerInputs(hidden, index, weights, held_out, domain)


def held_out_tokens(sequence: torch.Tensor, sequences: int) -> torch.Tensor:
    """Return which tokens judge, bool [T]: every fifth sequence, or the last, or the last fifth of a single one.

    Args:
        sequence: int [T], the sequence of each token, from 0 on.
        sequences: how many there are, those of which no token counts included.
    """
    if len(sequence.unique()) == 1:
        return torch.arange(len(sequence)) >= len(sequence) - len(sequence) // HOLD_OUT
    judges = torch.isin(sequence, torch.tensor(held_out_sequences(sequences)))
    # Or, where no token of these counts, the last of which one does.
    return judges if judges.any() else sequence == sequence.max()


def held_out_sequences(sequences: int) -> list[int]:
    """Return the numbers of those sequences, of so many, that judge: every fifth, or the last."""
    return list(range(HOLD_OUT - 1, sequences, HOLD_OUT)) or [sequences - 1]


def stream_inputs(
    groups: Sequence[Sequence[MoELayer]],
    batches: Sequence[Batch],
    *,
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[Sequence[MoELayer], LayerInputs]]:
    """Yield each group of layers (which share their experts; mostly one layer) with what its experts see, joined.

    Args:
        batches: run as often as needed for what is in memory at a time to stay below `memory_limit`.
        memory_limit: bytes; a single group may take more.

    Raises:
        ValueError: see `capture_inputs`.
    """
    waiting = list(groups)
    while waiting:
        chosen: list[Sequence[MoELayer]] = []
        total = 0
        while waiting and (not chosen or total + _num_bytes(waiting[0], batches) <= memory_limit):
            total += _num_bytes(waiting[0], batches)
            chosen.append(waiting.pop(0))
        captured = capture_inputs([layer for group in chosen for layer in group], batches)
        for group in chosen:
            first, *others = [captured.pop(layer.name) for layer in group]
            yield group, sum(others, first)


def _num_bytes(group: Sequence[MoELayer], batches: Sequence[Batch]) -> int:
    layer, tokens = group[0], 0
    for batch in batches:
        sizes = (value.shape[:2].numel() for value in batch.values() if isinstance(value, torch.Tensor))
        tokens += max(sizes, default=0)
    return len(group) * tokens * (layer.hidden_size * layer.model.dtype.itemsize + 12 * (layer.top_k or 1))
