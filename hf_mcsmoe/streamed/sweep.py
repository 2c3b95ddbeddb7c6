"""One sweep over the blocks of a checkpoint, in which original and students pass each block side by side.

At each block the original's forwards pass first; then a student's block is made stage by stage, and after each stage
the forwards of the model as it is then pass it; and then the next student's, when the block of this one is freed. So
every stage sees what it would see in memory, where all layers are at one stage before any is at the next.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch

from hf_mcsmoe.calibration.inputs import Captured
from hf_mcsmoe.evaluation.costs import Counting, expert_modules
from hf_mcsmoe.evaluation.held_out import Judge, Measure, predictions
from hf_mcsmoe.layers.batches import Batch, RoutedSink, Watch, evaluation_mode, forward, hooks
from hf_mcsmoe.layers.finite import check_all, check_outside
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.streaming import Forward, Turn, Turnstile, blocks, current_key, is_between_blocks, run_in_turns
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.streamed.parts import FITTED, JUDGED, MADE, ORIGINAL, SAMPLE, Block, Course, Key, Rows, Stage
from hf_mcsmoe.streamed.states import States


class Sweep:
    """Passes all blocks once, and makes the students'."""

    def __init__(self, folder: Folder, courses: Sequence[Course], rows: Rows, judge: Judge) -> None:
        """Take the students, all of `folder`, with their stages, and what passes."""
        self.folder, self.courses, self.rows, self.judge = folder, courses, rows, judge
        self.counts: dict[str, Counting] = {}
        self.passed: list[str] = []  # blocks that are done
        self.finished: Sequence[str] = ()  # those that were when it began
        self._before: dict[str, int] = {}
        self._experts: dict[str, dict[str, int]] = {}
        self.inside: dict[str, dict[str, int]] = {}  # FLOPs inside of blocks, by stream and the block's path
        self._measures: dict[str, Measure] = {}
        self._sinks: list[tuple[Callable[[Key], bool], RoutedSink]] = []
        students = [course.student.model for course in courses]
        self._watches = {model: Watch(model, self._dispatch) for model in (folder.model, *students)}
        streams = {stage.stream: course.student.model for course in courses for stage in course.stages}
        self._models = {ORIGINAL: folder.model, **streams}

    def run(
        self,
        states: States,
        finished: Sequence[str],
        write: Callable[[int, str, Any], None],
        done: Callable[[str], None],
    ) -> None:
        """Pass all blocks, and measure all stages.

        Args:
            states: keeps what blocks return.
            finished: the paths of blocks that are done already.
            write: called with a student's number, a block's path and its module in the student when that is done.
            done: called with the path when it is of all students.
        """
        of_model, *of_students = (
            {path: block for path, block in blocks(model).items() if path not in finished} for model in self._watches
        )
        self.finished, self.passed = finished, [*finished]
        turnstiles = [Turnstile(of_model, self.folder.loaded), *(Turnstile(own, _nothing) for own in of_students)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for model in self._watches:
                stack.enter_context(evaluation_mode(model))
            stack.enter_context(self.folder.loaded_outside())
            for course in self.courses:
                stack.enter_context(course.student.borrowed_outside())
            check_outside(self.folder.model)
            for turnstile, model in zip(turnstiles, self._watches, strict=True):
                stack.enter_context(turnstile.installed())
                handles = stack.enter_context(hooks())
                for path, block in turnstile.blocks.items():
                    handles.append(block.register_forward_hook(partial(self._left, path)))
                stack.enter_context(states.kept(model, finished))
            turns = partial(self._turns, write, done)
            run_in_turns(self._forwards(), list(of_model), turns)
            for path in of_model:  # those that no forward passes
                if path not in self.passed and any(_is_in(name, path) for name in self._changed):
                    deque(turns(path), maxlen=0)
                elif path not in self.passed:
                    with self.folder.loaded(path) as module:
                        check_all(path, module)
        for measure in self._measures.values():
            measure.close()

    @property
    def _changed(self) -> set[str]:
        """The layers that a plan or a stage names."""
        stages = [(course.student.plan.layers, *(stage.names for stage in course.stages)) for course in self.courses]
        return {name for parts in stages for names in parts for name in names}

    def resume(self, inside: dict[str, dict[str, int]], experts: dict[str, dict[str, int]]) -> None:
        """Take the FLOPs that were counted in finished blocks, by stream and block, and by stream and layer."""
        self.inside, self._experts = inside, experts

    def _forwards(self) -> list[Forward]:
        forwards = []
        for stream, judged, kinds in self._streams():
            if JUDGED in kinds:
                self._measures[stream] = self.judge.of_stage(judged) if judged else self.judge.of_original()
            if SAMPLE in kinds:
                self.counts[stream] = Counting()
                self.counts[stream].experts = self._experts.get(stream, {})
            for kind, batches in self._batches(kinds):
                for number, batch in enumerate(batches):
                    key = Key(stream, kind, number)
                    forwards.append(Forward(partial(self._run, key, batch), key))
        return forwards

    def _streams(self) -> Iterator[tuple[str, str, set[str]]]:
        """Yield the streams in their order: name, what the record calls the stage, and which forwards it has."""
        every = {FITTED, MADE, JUDGED, SAMPLE}
        yield ORIGINAL, "", every if self._reads_original else {JUDGED, SAMPLE}
        for stages in (course.stages for course in self.courses):
            for number, stage in enumerate(stages):
                is_read = stage.reads_itself or any(other.reads_before for other in stages[number + 1 : number + 2])
                wanted = {FITTED: is_read, MADE: is_read, JUDGED: bool(stage.judged), SAMPLE: stage.is_counted}
                yield stage.stream, stage.judged, {kind for kind, is_wanted in wanted.items() if is_wanted}

    @property
    def _reads_original(self) -> bool:
        return any(stage.reads_original for course in self.courses for stage in course.stages)

    def _batches(self, kinds: set[str]) -> Iterator[tuple[str, Sequence[Batch]]]:
        given = {kind: self.rows.of((kind,)) for kind in (FITTED, MADE, SAMPLE)} | {JUDGED: self.judge.all_batches}
        yield from ((kind, batches) for kind, batches in given.items() if kind in kinds)

    def _run(self, key: Key, batch: Batch) -> None:
        watch = self._watches[self._models[key.stream]]
        if key.kind == JUDGED:
            self._measures[key.stream].take(key.number, predictions(watch.model, batch))
        elif key.kind == SAMPLE:
            with self.counts[key.stream].counter:
                forward(watch.model, batch)
        else:
            watch.run(batch)

    def _left(self, path: str, *_: Any) -> None:
        """Keep what a forward that is counted took inside of a block."""
        key = current_key()
        if isinstance(key, Key) and key.kind == SAMPLE and is_between_blocks():
            flops = self.counts[key.stream].counter.get_total_flops()
            self.inside.setdefault(key.stream, {})[path] = flops - self._before[key.stream]

    def flops(self, stream: str) -> int:
        """Return the FLOPs of a stream's counted forward, of which blocks that were finished before count as then."""
        inside = self.inside.get(stream, {})
        return self.counts[stream].counter.get_total_flops() + sum(inside[path] for path in self.finished)

    def _dispatch(self, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        for chosen, sink in self._sinks:
            if chosen(current_key()):
                sink(layer, routed, counted, batch)

    @contextlib.contextmanager
    def _watching(self, layers: Sequence[MoELayer], chosen: Callable[[Key], bool], sink: RoutedSink) -> Iterator[None]:
        """Hand what layers see in the forwards that `chosen` takes to `sink`."""
        entry = chosen, sink
        self._sinks.append(entry)
        try:
            with hooks() as handles:
                for layer in layers:
                    handles.extend(self._watches[layer.model].routed(layer))
                yield
        finally:
            self._sinks.remove(entry)

    def _turns(self, write: Callable[[int, str, Any], None], done: Callable[[str], None], path: str) -> Iterator[Turn]:
        with self.folder.loaded(path) as module:
            check_all(path, module)
            originals = {name: layer for name, layer in self._originals.items() if _is_in(name, path)}
            seen = Captured(list(originals), self.rows.of((FITTED, MADE)))
            watched = [*originals.values()] if self._reads_original else []
            with evaluation_mode(cast(Any, module)):  # gives back to routers what a forward has cast
                yield from self._pass(ORIGINAL, watched, originals, seen.keep, (FITTED, MADE))
            for number, course in enumerate(self.courses):
                block = Block(path, course.student, originals, seen, self.rows, self._peek)
                yield from self._made(block, course.stages, partial(write, number))
        self.passed.append(path)
        done(path)

    @property
    def _originals(self) -> dict[str, MoELayer]:
        return self.courses[0].student.originals

    def _made(self, block: Block, stages: Sequence[Stage], write: Callable[[str, Any], None]) -> Iterator[Turn]:
        """Make a student's block stage by stage; yields the turns of its forwards."""
        merge, *others = stages
        yield from merge.work(block)
        with block.student.borrowed(block.path) as ours:
            with evaluation_mode(ours):
                for stage, after in zip(stages, [*others, None], strict=True):
                    if stage is not merge:
                        yield from stage.work(block)
                    yield from self._pass_to(stage, after, block)
            write(block.path, ours)

    def _pass_to(self, stage: Stage, after: Stage | None, block: Block) -> Iterator[Turn]:
        """Yield the turn in which the stream of a stage passes the block, for the stage after it to see."""
        watched: list[MoELayer] = []
        if after is not None and after.reads_before:
            after.begin(block)
            watched = after.chosen(block)
        see = stage.see if after is None else after.see
        yield from self._pass(stage.stream, watched, block.layers, see, (FITTED,))

    def _pass(
        self,
        stream: str,
        watched: Sequence[MoELayer],
        layers: dict[str, MoELayer],
        sink: RoutedSink,
        kinds: tuple[str, ...],
    ) -> Iterator[Turn]:
        """Yield the turn in which a stream's forwards pass the block, and those of `kinds` show what layers see."""

        def fitted(key: Key) -> bool:
            return key.stream == stream and key.kind in kinds

        counting = self.counts.get(stream)
        experts = {} if counting is None else {layer.name: expert_modules(layer) for layer in layers.values()}
        self._before[stream] = counting.counter.get_total_flops() if counting else 0
        with self._watching(watched, fitted, sink), counting.watching(experts) if counting else _nothing():
            yield Turn(lambda key: key.stream == stream)

    def _peek(self, stream: str, layer: MoELayer, kinds: tuple[str, ...], found: Captured) -> Iterator[Turn]:
        """Yield the turn in which a stream's forwards show what a layer of the block would see of them now."""

        def chosen(key: Key) -> bool:
            return key.stream == stream and key.kind in kinds

        with self._watching([layer], chosen, found.keep):
            yield Turn(chosen, peeks=True)


def _is_in(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def _nothing(*_: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
