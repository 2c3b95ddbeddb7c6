"""The sweep that measures what choices cost, block by block; what is known of finished blocks is kept."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.inputs import Captured
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, Watch, evaluation_mode, hooks
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.finite import check_all, check_outside
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.layers.streaming import Forward, Turn, Turnstile, blocks, run_in_turns
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.processes import current
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.bench import Bench
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import check_sums, measure_curves, plans_of_all
from hf_mcsmoe.search.observed import Observations
from hf_mcsmoe.streamed.parts import FITTED, ORIGINAL, Key
from hf_mcsmoe.streamed.states import States
from hf_mcsmoe.streamed.trials import Trials


def curves_by_blocks(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    search: SizeConfig,
    *,
    repair: RepairConfig,
    states: States,
    kept: dict[str, Any],
    done: Callable[[str], None],
) -> dict[str, LayerCurves]:
    """Do what `measure_curves` does, and keep what is finished.

    Args:
        layers: of a `Folder`, none of which share experts.
        kept: what is known of finished blocks, as JSON values; empty at the beginning.
        done: called with a block's path when `kept` knows of it.

    Raises:
        ValueError: see `measure_curves`.
    """
    check_sums(statistics, merge, search)
    plans, model = plans_of_all(layers, statistics, merge, search), layers.model
    folder, rows = cast(Folder, layers.source), list(apart(model, batches))
    chosen = [shared[0] for shared in layers.selected(merge.skip).tied]
    finished, seen = kept.setdefault("finished", []), kept.setdefault("seen", {})
    trials, captured = Trials(model, batches, states), dict[str, Captured]()
    if finished:
        trials.resume(kept, finished)
    watch = Watch(model, lambda layer, *routed: captured[layer.name].keep(layer, *routed))

    def turns(path: str) -> Iterator[Turn]:
        here = [layer for layer in chosen if layer.name.startswith(f"{path}.")]
        captured.update({layer.name: Captured([layer.name], rows) for layer in here})
        with folder.loaded(path) as module:
            check_all(path, module)
            with evaluation_mode(cast(Any, module)), hooks() as handles:
                for layer in here:
                    handles.extend(watch.routed(layer))
                yield Turn(lambda key: True)
            trials.path = path
            trials.pass_block()
            for layer in here:
                sums, inputs = statistics.together([layer.name]), captured.pop(layer.name).joined(layer.name)
                with layer.open() as originals:
                    bench = Bench([layer], originals, inputs, sums, trials, repair)
                    seen[layer.name] = bench.observations(search, plans).to_dict()
        trials.passed.append(path)
        finished.append(path)
        kept.update(trials.told())
        done(path)

    left = {path: block for path, block in blocks(model).items() if path not in finished}
    if left:  # else all of it is known
        with torch.no_grad(), evaluation_mode(model), _passing(folder, left), states.kept(model, finished):
            check_outside(model)
            forwards = [
                Forward(partial(watch.run, batch), Key(ORIGINAL, FITTED, number)) for number, batch in enumerate(rows)
            ]
            run_in_turns([*forwards, *trials.forwards()], list(left), turns)
    trials.check()
    return {name: Observations.from_dict(values).curves(trials.effects) for name, values in seen.items()}


def curves_of_folder(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Sequence[Batch],
    merge: MergeConfig,
    search: SizeConfig,
    *,
    repair: RepairConfig,
    progress: Callable[[str, int, int], None],
    place: Path,
) -> dict[str, LayerCurves]:
    """Do what `measure_curves` does, in one go.

    Args:
        layers: of a `Folder`.
        progress: called as `progress(block's path, blocks done, blocks)`.
        place: a folder, on the disk of which hidden states lie meanwhile.

    Raises:
        ValueError: see `measure_curves` and `check_blocks`; several processes.
    """
    check_blocks(layers)
    if current().size > 1:
        raise ValueError("What choices cost is measured block by block in one process: start one.")
    paths = list(blocks(layers.model))
    with tempfile.TemporaryDirectory(prefix=".mcsmoe-curves-", dir=place) as folder:
        states = States(Path(folder), paths, mapped=True)

        def done(path: str) -> None:
            states.forget(path)
            progress(path, paths.index(path) + 1, len(paths))

        options: dict[str, Any] = {"repair": repair, "states": states, "kept": {}, "done": done}
        return curves_by_blocks(layers, statistics, batches, merge, search, **options)


@contextlib.contextmanager
def _passing(folder: Folder, left: Mapping[str, nn.Module]) -> Iterator[None]:
    with folder.loaded_outside(), Turnstile(left, folder.loaded).installed():
        yield


def add_curves(
    layers: Layers,
    batches: Sequence[Batch],
    statistics: RoutingStatistics,
    config: MergeConfig,
    search: SizeConfig,
    progress: Progress,
    place: Path,
) -> None:
    """Measure what choices cost, of a `Folder` block by block, and keep it with the statistics.

    Args:
        place: a folder on the disk of which hidden states may lie meanwhile.
    """

    def tell(name: str, done: int, total: int) -> None:
        progress("curves", done, total)

    given = layers, statistics, batches, config, search
    if isinstance(layers.source, Folder):
        statistics.curves = curves_of_folder(*given, repair=JOINT, progress=tell, place=place)
    else:
        statistics.curves = measure_curves(*given, repair=JOINT, progress=tell)
    statistics.conditions = conditions(config, search, JOINT)
