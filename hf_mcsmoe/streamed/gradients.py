"""The first sweep where statistics read gradients: through all blocks, and back through them, see `ByBlocks`.

What each block gives stays on disk until all of it is done, for the way back and for a run that goes on; sums are
taken on the way back, where each block is run once more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

from hf_mcsmoe.calibration.collect import WithGradients, check_collected, check_finite
from hf_mcsmoe.calibration.gradients import check_loss, gradients_of_experts
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.backward import ByBlocks, Gradients, apart
from hf_mcsmoe.layers.batches import Batch, Watch, evaluation_mode, hooks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_all, check_outside
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import BACK, Forward, Turn, Turnstile, blocks, run_in_turns, way_of
from hf_mcsmoe.methods.statistics import with_tokens
from hf_mcsmoe.streamed.journal import GONE_BACK, STATISTICS, Journal
from hf_mcsmoe.streamed.parts import FITTED, ORIGINAL, Key
from hf_mcsmoe.streamed.states import States
from hf_mcsmoe.streamed.sums import known_sums, save_sums

# What is kept beside the outputs of blocks: gradients of what blocks before gave, and what routers said.
GRADIENTS, SAID = "gradients", "said"


class Trail:
    """Keeps what forwards go back through; see `Keeper`."""

    def __init__(self, states: States, passed: Sequence[str]) -> None:
        """Keep it with the outputs of blocks, which `states` stores before this sees them."""
        self.states, self.passed = states, tuple(passed)

    def outputs(self, path: str, given: Any, said: list[Any]) -> tuple[Any, list[Any]]:
        """Return it apart from any graph, and what routers of a finished block said in an earlier run."""
        if said:
            self.states.keep(path, SAID, said)
        return apart(given), said or self.states.held(SAID, [path]) or []

    def gradients(self, path: str, found: Gradients) -> Gradients:
        """Keep and return them."""
        return self.states.keep(path, GRADIENTS, found)

    def known(self) -> Gradients:
        """Return those that the last block left which the forward went back through."""
        return self.states.held(GRADIENTS, ["", *self.passed])


def collect_back(
    layers: Layers,
    batches: Sequence[Batch],
    needs: Sequence[str],
    states: States,
    journal: Journal,
    done: Callable[[], None],
) -> RoutingStatistics:
    """Do what `collect_statistics` does of statistics that read gradients; see `collect_by_blocks`."""
    names = with_tokens(needs)
    check_collected(names)
    check_loss(layers.model, names)
    folder, content = cast(Folder, layers.source), journal.content
    finished, gone_back = content.setdefault(STATISTICS, []), content.setdefault(GONE_BACK, [])
    found = known_sums(layers, journal, len(gone_back))
    taken = WithGradients(found, names, ByBlocks(layers, Trail(states, gone_back)))
    watch = Watch(folder.model, taken.take)

    def turns(place: str) -> Iterator[Turn]:
        path, is_back = place.removesuffix(BACK), place.endswith(BACK)
        here = [layer for layer in layers if layer.name.startswith(f"{path}.")] if is_back else []
        with folder.loaded(place) as module, hooks() as handles:
            if not is_back:
                check_all(path, module)
            for layer in here:
                handles.extend(watch.routed(layer))
            yield Turn(lambda key: True)
        done()
        if is_back:
            save_sums(found, here, journal, len(gone_back))
        (gone_back if is_back else finished).append(path)
        journal.save()
        if is_back:
            states.drop(GRADIENTS, path, ["", *gone_back[:-1]])

    forwards = [
        Forward(partial(watch.run, batch, taken.step), Key(ORIGINAL, FITTED, number))
        for number, batch in enumerate(batches)
    ]
    of_model = blocks(folder.model)
    left = {path: block for path, block in of_model.items() if path not in finished}
    with ExitStack() as stack:
        stack.enter_context(gradients_of_experts(layers))
        stack.enter_context(evaluation_mode(folder.model))
        stack.enter_context(folder.loaded_outside())
        stack.enter_context(Turnstile(left, folder.loaded).installed())
        stack.enter_context(states.kept(folder.model, tuple(finished), each=True))
        stack.enter_context(taken.backward.installed())
        check_outside(folder.model)
        run_in_turns(forwards, way_of(of_model), turns)
    check_finite(found, layers)
    return found
