"""How a result comes to be that is compared: in memory, or block by block in a folder that goes when it is judged."""

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_mcsmoe.attached import record_of
from hf_mcsmoe.compare.grid import Draw
from hf_mcsmoe.compare.ways import Task
from hf_mcsmoe.compress import compress
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.source import InMemory, Source
from hf_mcsmoe.record import Record
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import StreamConfig

# The folder of a result that is judged; a run that was killed goes on with it.
NAME = "result-{}"


@dataclass(frozen=True)
class Result:
    """A result that is there as long as it is judged, and the record of how it was made."""

    source: Source
    record: Record


@contextlib.contextmanager
def result(layers: Layers, draw: Draw, task: Task, work: Path) -> Iterator[Result]:
    """Yield what `compress` makes of a model; of a `Folder` it lies in a folder below `work` until the block ends."""
    options: dict[str, Any] = {**task.options, "statistics": draw.statistics}
    if not task.way.has_seed:
        options["config"] = replace(options["config"], seed=draw.seed)
    if task.options.get("size"):
        options["held_out"] = draw.held_out
    batches = draw.fitted if task.reads else []
    if not isinstance(layers.source, Folder):
        student = compress(layers, batches, **options)
        yield Result(InMemory(student), record_of(student))
        return
    told = json.dumps([task.way.told(), str(task.level), draw.seed])
    place = work / NAME.format(hashlib.sha256(told.encode()).hexdigest()[:16])
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed while it was judged
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No tokenizer lies")
            record = _made(layers.source, place, batches, options)
        yield Result(Folder(place, device=str(layers.source.device)), record)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _made(source: Folder, place: Path, batches: Sequence[Batch], options: Mapping[str, Any]) -> Record:
    """Write a result; one that was begun with other statistics or versions, with which it cannot go on, anew."""
    is_begun = any(place.parent.glob(f".{place.name}*"))
    try:
        return compress_folder(source, place, batches, **options)
    except ValueError:
        if not is_begun:
            raise
        return compress_folder(source, place, batches, **options, stream=StreamConfig(restart=True))


def remove_results(work: Path) -> None:
    """Remove what runs that were killed have left of results that nobody asks for any more."""
    for pattern in (NAME, f".{NAME}"):
        for left in work.glob(pattern.format("*")):
            shutil.rmtree(left, ignore_errors=True)
