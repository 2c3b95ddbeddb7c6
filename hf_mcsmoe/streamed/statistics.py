"""The first sweep: what routers and experts do, summed block by block, each block's sums on disk when it is done."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from hf_mcsmoe.calibration.collect import add_sums, check_collected, check_finite
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, Watch, evaluation_mode, hooks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_all, check_outside
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import Forward, Turn, Turnstile, blocks, run_in_turns
from hf_mcsmoe.methods.statistics import with_tokens
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.streamed.journal import STATISTICS, Journal
from hf_mcsmoe.streamed.parts import FITTED, ORIGINAL, Key
from hf_mcsmoe.streamed.states import States


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
    folder, found = cast(Folder, layers.source), RoutingStatistics(layers.fingerprint)
    finished: list[str] = journal.content[STATISTICS]
    for number, _ in enumerate(finished):
        found.layers |= RoutingStatistics.load(_file(journal, number)).layers
    found.layers = {layer.name: found.layers.get(layer.name, Sums()) for layer in layers}
    watch = Watch(folder.model, lambda layer, routed, counted, _: add_sums(found[layer.name], routed, counted, names))

    def turns(path: str) -> Iterator[Turn]:
        here = [layer for layer in layers if layer.name.startswith(f"{path}.")]
        with folder.loaded(path) as module, hooks() as handles:
            check_all(path, module)
            for layer in here:
                handles.extend(watch.routed(layer))
            yield Turn(lambda key: True)
        done()
        own = RoutingStatistics(found.fingerprint, {layer.name: found[layer.name] for layer in here})
        own.save(_file(journal, len(finished)))
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


def _file(journal: Journal, number: int) -> str:
    return str(journal.folder / f"sums-{number:05d}.safetensors")
