"""The batches of a pass, shared by the processes that work together, and sums over what all of them saw."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.layers.sharded import is_sharded, layout
from hf_mcsmoe.methods.registry import adds
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.processes import Processes, current


def check_layout(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise ValueError where a model is split over processes in a way that hides what statistics read."""
    tensors, experts = layout(model)
    methods = [STATISTICS.find(name) for name in names]
    late = next((method.name for method in methods if method.gradients), None)
    computed = next((method.name for method in methods if method.products), None)
    reason = None
    if tensors > 1:
        reason = f"with tp_size={tensors} all processes run each batch together, and here each is given its own"
    elif late and is_sharded(model):
        reason = f"{late} reads gradients of whole experts"
    elif computed and experts > 1:
        reason = f"{computed} runs experts that other processes hold (ep_size={experts})"
    if reason:
        raise ValueError(
            f"{type(model).__name__} is split over processes so that it cannot be calibrated: {reason}. Load it with "
            "DistributedConfig(fsdp_size=...) alone, or whole" + (", for that statistic." if late else ".")
        )


class Filler(dict[str, Any]):
    """A batch that counts nowhere: it is run since all processes take part in each forward of a sharded model."""


def own_batches(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[Batch] | None:
    """Return the share of the batches that this process runs, packed rows apart; None where it has none.

    The batch `k` of a process is, of all, the one with the number `rank + k * size`. Of a sharded model all processes
    run as many, some a `Filler` in the end.

    Raises:
        ValueError: no process has any.
    """
    processes = current()
    if processes.size == 1:
        return iter(batches)
    own = _filled(model, apart(model, batches), processes)
    first = next(own, None)
    if not any(processes.gathered(first is not None)):
        raise ValueError("The calibration set is empty: pass at least one batch.")
    return None if first is None else chain([first], own)


def _filled(model: PreTrainedModel, batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    number, batch = -1, None
    for number, batch in enumerate(batches):
        if number % processes.size == processes.rank:
            yield batch
    missing = (number + 1) % processes.size
    if batch is not None and missing and processes.rank >= missing and is_sharded(model):
        yield Filler(batch)


def summed(statistics: RoutingStatistics) -> None:
    """Make of the sums of each process, in place, those of all: added, or as the statistic combines its parts."""
    processes = current()
    if processes.size == 1:
        return
    for layer in statistics.layers:
        own = statistics[layer]
        kinds = processes.gathered({name: (value.shape, value.dtype) for name, value in own.items()})
        known = {name: kind for held in kinds for name, kind in held.items()}
        statistics.layers[layer] = Sums(
            {name: _over_all(processes, name, own.get(name), *kind) for name, kind in known.items()}
        )


def _over_all(
    processes: Processes, name: str, own: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return what a statistic says of the tokens of all processes.

    Args:
        own: None where this process saw no token.
        shape: of some process's.
    """
    method = STATISTICS.find(name)
    if adds(method):
        return processes.added(torch.zeros(shape, dtype=dtype) if own is None else own)
    first, *others = [part for part in processes.gathered(own) if part is not None]
    for part in others:
        first = method.combine(first, part)
    return first
