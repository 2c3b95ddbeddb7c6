"""The first sweep: what routers and experts do, summed block by block, each block's sums on disk when it is done.

Several processes share it, and each goes on from the blocks that it has finished itself, however far the others are:
nothing is exchanged before the end.
"""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from hf_mcsmoe.calibration.collect import add_sums, check_collected, check_finite
from hf_mcsmoe.calibration.shares import summed
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, Watch, evaluation_mode, hooks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_all, check_outside
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.layers.streaming import Forward, Turn, Turnstile, blocks, run_in_turns
from hf_mcsmoe.methods.statistics import gradient_names, of_data, with_tokens
from hf_mcsmoe.modeling.folders_mcsmoe import WORK, working_folder
from hf_mcsmoe.processes import Processes, working_as
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.streamed.gradients import collect_back
from hf_mcsmoe.streamed.journal import GONE_BACK, PARTS, STATISTICS, Journal
from hf_mcsmoe.streamed.parts import FITTED, ORIGINAL, Key
from hf_mcsmoe.streamed.states import States
from hf_mcsmoe.streamed.sums import known_sums, save_sums

# In the folder of a run, the sums of its first sweep.
SUMS = "statistics.safetensors"


def first_sweep(
    layers: Layers,
    batches: Sequence[Batch],
    needs: Sequence[str],
    place: Path,
    run: Mapping[str, Any],
    processes: Processes,
    tell: Progress,
    *,
    restart: bool,
    mapped: bool,
) -> RoutingStatistics:
    """Return the sums over all batches, of which each process runs its share and keeps what it has finished.

    Args:
        place: the folder of the run, where the first process writes the sums.
        run: what decides on them, see `Journal`. What is kept of another run, which the first process has refused, is
            on another machine, and is begun anew.
        restart: whether all is.
        mapped: whether hidden states are mapped from the disk.

    Raises:
        ValueError: see `collect_by_blocks`.
        RuntimeError: another process failed.
    """
    folder, paths = cast(Folder, layers.source), list(blocks(layers.model))
    with _part(place, run, processes, restart=restart) as part:
        goes_back = bool(gradient_names(of_data(needs)))
        kept = [part.content.setdefault(key, []) for key in (STATISTICS, GONE_BACK)[: 1 + goes_back]]
        number = len(kept) * len(paths)
        if folder.snapshot is not None and not processes.is_first:
            part.follow(folder.snapshot)

        def done() -> None:
            part.check_source(folder)
            tell(STATISTICS, sum(map(len, kept)) + 1, number)

        tell(STATISTICS, sum(map(len, kept)), number)
        states, own = States(part.folder, paths, mapped=mapped), list(processes.own(apart(layers.model, batches)))
        with working_as(processes):
            collect = collect_back if goes_back else collect_by_blocks
            found = collect(layers, own, of_data(needs), states, part, done)
            tell(STATISTICS, number, number)  # no gradient reaches what lies before the first experts
            summed(found)
            folder.end_pass()
        processes.agreed(partial(found.save, place / SUMS))
        part.remove()
    return found


@contextlib.contextmanager
def _part(place: Path, run: Mapping[str, Any], processes: Processes, *, restart: bool) -> Iterator[Journal]:
    """Yield the journal of this process, in a folder of its own in that of the run."""
    with working_folder(place / f"rank-{processes.rank}-of-{processes.size}") as work:
        try:
            part = Journal(work, run, restart=restart)
        except ValueError:
            part = Journal(work, run, restart=True)
        yield part
    for empty in (place, place.parent):  # on another machine than the first process's
        with contextlib.suppress(OSError):
            empty.rmdir()


def forget_others(place: Path, processes: Processes) -> None:
    """Remove what another number of processes has kept of the first sweep, and tell it."""
    for part in place.glob(PARTS):
        number = part.name.removesuffix(WORK).rpartition("-")[2]
        if number != str(processes.size):
            shutil.rmtree(part)
            warnings.warn(
                f"The first sweep was begun by {number} processes and begins anew with {processes.size}: each goes on "
                "with its own share of the rows alone.",
                stacklevel=2,
            )


def collect_by_blocks(
    layers: Layers,
    batches: Sequence[Batch],
    needs: Sequence[str],
    states: States,
    journal: Journal,
    done: Callable[[], None],
) -> RoutingStatistics:
    """Do what `collect_statistics` does, and keep what is finished.

    Args:
        batches: that are run as they are.
        done: called when a block is, before the journal knows.

    Raises:
        ValueError: see `collect_statistics`.
    """
    names = with_tokens(needs)
    check_collected(names)
    folder, finished = cast(Folder, layers.source), journal.content.setdefault(STATISTICS, [])
    found = known_sums(layers, journal, len(finished))
    watch = Watch(folder.model, lambda layer, routed, counted, _: add_sums(found[layer.name], routed, counted, names))

    def turns(path: str) -> Iterator[Turn]:
        here = [layer for layer in layers if layer.name.startswith(f"{path}.")]
        with folder.loaded(path) as module, hooks() as handles:
            check_all(path, module)
            for layer in here:
                handles.extend(watch.routed(layer))
            yield Turn(lambda key: True)
        done()
        save_sums(found, here, journal, len(finished))
        finished.append(path)
        journal.save()
        states.forget(path)

    forwards = [
        Forward(partial(watch.run, batch), Key(ORIGINAL, FITTED, number)) for number, batch in enumerate(batches)
    ]
    left = {path: block for path, block in blocks(folder.model).items() if path not in finished}
    turnstile = Turnstile(left, folder.loaded)
    modes = evaluation_mode(folder.model), folder.loaded_outside(), turnstile.installed()
    with modes[0], modes[1], modes[2], states.kept(folder.model, finished):
        check_outside(folder.model)
        run_in_turns(forwards, list(left), turns)
    check_finite(found, layers)
    return found
