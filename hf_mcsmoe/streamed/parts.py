"""What a sweep is made of: forwards told by keys, the block in work, and the stages that change it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_mcsmoe.calibration.inputs import Captured
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.streaming import Turn
from hf_mcsmoe.streamed.student import Student

# The stream of the original's forwards; those of the student are called as its stages.
ORIGINAL = "original"
# Kinds of forwards: of rows that stages are fitted to, made rows among them, rows that judge, one to count FLOPs on.
FITTED, MADE, JUDGED, SAMPLE = "fitted", "made", "judged", "sample"


@dataclass(frozen=True)
class Key:
    """What a forward is of: a stream, a kind and a number in it."""

    stream: str
    kind: str
    number: int


@dataclass(frozen=True)
class Rows:
    """The batches that pass: those that stages are fitted to, those made of them, and one to count FLOPs on."""

    fitted: Sequence[Batch]
    made: Sequence[Batch] = ()
    sample: Batch | None = None

    def of(self, kinds: Sequence[str]) -> list[Batch]:
        """Return the batches of some kinds, in the order in which they pass."""
        given = {FITTED: self.fitted, MADE: self.made, SAMPLE: [] if self.sample is None else [self.sample]}
        return [batch for kind, batches in given.items() if kind in kinds for batch in batches]


@dataclass
class Block:
    """The block in work: its path, the original's layers in it, and what these see, where a stage reads that."""

    path: str
    student: Student
    originals: dict[str, MoELayer]
    seen: Captured
    rows: Rows
    # Called with a stream, a layer, kinds of forwards and what is to keep their inputs; yields the turns for that.
    peek: Callable[[str, MoELayer, tuple[str, ...], Captured], Iterator[Turn]]

    @property
    def layers(self) -> dict[str, MoELayer]:
        """The student's layers as they are now, by the names that they had before."""
        return self.student.in_block(self.path)


@dataclass
class Stage:
    """What is done to the student's block at one stage, and what the record calls it, "" where nobody measures it.

    `names` are the layers that it changes, by the names that they had before. `told` is what became of each of them,
    as JSON values.
    """

    stream: str
    names: Sequence[str]
    judged: str = ""
    is_counted: bool = False  # whether FLOPs are counted of what it leaves
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_original(self) -> bool:
        """Whether it reads what the original's layers see."""
        return False

    @property
    def reads_itself(self) -> bool:
        """Whether it reads what its own stream brings, the layers before having passed this stage."""
        return False

    @property
    def reads_before(self) -> bool:
        """Whether it reads what its layers see in the stream before it."""
        return False

    def begin(self, block: Block) -> None:
        """Begin with a block, before the stream before this one passes it."""

    def see(self, layer: MoELayer, routed: Any, counted: torch.Tensor | None, batch: Batch) -> None:
        """Take what one of its layers sees of one batch in the stream before it."""

    def work(self, block: Block) -> Iterator[Turn]:
        """Change the block; yields turns for forwards to peek at it meanwhile."""
        yield from ()

    def chosen(self, block: Block) -> list[MoELayer]:
        """Return its layers in a block, as they are now."""
        return [layer for name, layer in block.layers.items() if name in self.names]


@dataclass(frozen=True)
class Course:
    """One student and its stages in their order, of which the first merges."""

    student: Student
    stages: Sequence[Stage]
