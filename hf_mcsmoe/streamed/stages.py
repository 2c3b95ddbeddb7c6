"""The stages of a compression, each as what it does to one block."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from hf_mcsmoe.calibration.collect import add_sums
from hf_mcsmoe.calibration.inputs import Captured, LayerInputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.streaming import Turn
from hf_mcsmoe.layers.whole import convert_whole
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import decompose_compactly
from hf_mcsmoe.low_rank.ranks import layer_ranks, spectra_of
from hf_mcsmoe.methods.choice import Choice
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.quantization.quantize import quantize_fit
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.least_squares import ExpertFit
from hf_mcsmoe.repair.methods import LayerRepair, RepairConfig
from hf_mcsmoe.repair.repair import RepairReport, known_inputs, map_of_fit, original_of, repair_layer
from hf_mcsmoe.repair.rows import Fitted
from hf_mcsmoe.search.apply import is_converted, store_layer
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import sparsify_shared
from hf_mcsmoe.streamed.parts import FITTED, MADE, Block, Stage

# A layer's original, what that sees, and what the layer itself sees.
Inputs = tuple[MoELayer, LayerInputs, LayerInputs]


@dataclass
class Merging(Stage):
    """Merges the layers by the plan."""

    statistics: RoutingStatistics | None = None

    def work(self, block: Block) -> Iterator[Turn]:
        """Merge."""
        block.student.merge(block.originals.values(), self.statistics)
        yield from ()


@dataclass
class Converting(Stage):
    """Gives layers that kept all experts the form that merged ones have."""

    def work(self, block: Block) -> Iterator[Turn]:
        """Convert."""
        _convert(block, self.chosen(block))
        yield from ()


def _convert(block: Block, layers: Sequence[MoELayer]) -> None:
    for layer in layers:
        if not layer.merged:
            convert_whole(block.student.model, layer)


@dataclass
class Sparsifying(Stage):
    """Leaves out weights or hidden units inside experts.

    `known` are sums by the layers' names before, where they are known; else it is what its layers see that counts.
    """

    config: SparsityConfig = field(default_factory=SparsityConfig)
    known: Mapping[str, Sums] | None = None

    @property
    def reads_before(self) -> bool:
        """Whether it reads the stream before it: where sums are not known."""
        return self.known is None

    def begin(self, block: Block) -> None:
        """Begin with a block."""
        self._sums = {layer.original_name: Sums() for layer in self.chosen(block)}

    def see(self, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        """Add what a layer sees."""
        add_sums(self._sums[layer.original_name], routed, counted, SCORE.needs(self.config.score))

    def work(self, block: Block) -> Iterator[Turn]:
        """Leave out what scores least."""
        sums = self._sums if self.known is None else self.known
        for layer in self.chosen(block):
            if block.student.narrower is None:
                _make_own(layer.container)
            else:
                block.student.describe_narrower(layer)
            sparsify_shared([layer], sums[layer.original_name], self.config, block.student.narrower)
        yield from ()


def _make_own(experts: nn.Module) -> None:
    """Let experts hold copies of their weights, which they may have borrowed of the original."""
    for module in experts.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@dataclass
class Fitting(Stage):
    """What fits layers to the original's: `config` says how, and whether with the inputs that the student has."""

    config: RepairConfig = field(default_factory=RepairConfig)
    kinds: tuple[str, ...] = (FITTED,)
    may_be_cut: bool = False  # whether a layer's router may be cut, of which the original's inputs may not tell

    @property
    def reads_original(self) -> bool:
        """Whether it reads what the original's layers see: always."""
        return True

    @property
    def reads_itself(self) -> bool:
        """Whether the inputs that it reads are, or may be, the student's own."""
        return self.config.sequential or self.may_be_cut

    def inputs(self, layer: MoELayer, block: Block, number: int | None) -> Generator[Turn, None, Inputs]:
        """Yield turns until it is known, and is returned, which original a layer has, and what both see.

        Args:
            number: batches of the original's that count; None for all.
        """
        original = original_of(layer, block.originals)
        theirs = block.seen.joined(original.name, number)
        ours = None if self.config.sequential else known_inputs([(layer, original)], theirs)
        if ours is None:
            own = Captured([layer.name], block.rows.of(self.kinds))
            yield from block.peek(self.stream, layer, self.kinds, own)
            ours = own.joined(layer.name)
        return original, theirs, ours


@dataclass
class Repairing(Fitting):
    """Repairs layers against the original's."""

    kinds: tuple[str, ...] = (FITTED, MADE)

    def work(self, block: Block) -> Iterator[Turn]:
        """Repair."""
        for layer in self.chosen(block):
            original, theirs, ours = yield from self.inputs(layer, block, None)
            repaired = repair_layer((layer, original), ours, theirs, self.config)
            experts = [{**asdict(expert), "weight": None} for expert in repaired.experts]
            self.told[layer.name] = {**asdict(repaired), "experts": experts}

    def report(self, rows: int) -> RepairReport:
        """Return what became of all layers, fitted to so many sequences."""
        layers = {name: _repaired(values) for name, values in self.told.items()}
        return RepairReport(self.config.to_dict(), layers, 0.0, rows)


def _repaired(values: dict[str, Any]) -> LayerRepair:
    experts = [ExpertFit(**{**expert, "weight": torch.empty(0)}) for expert in values["experts"]]
    return LayerRepair(**{**values, "experts": experts})


@dataclass
class Decomposing(Stage):
    """Stores experts as low rank + sparse, of `ranks` by the layer's name before; None for those that its own give."""

    config: LoSparseConfig = field(default_factory=LoSparseConfig)
    ranks: Mapping[str, dict[str, int]] | None = None

    @property
    def reads_before(self) -> bool:
        """Whether it reads the stream before it: always."""
        return True

    def begin(self, block: Block) -> None:
        """Begin with a block."""
        self._seen = Captured([layer.name for layer in self.chosen(block)], block.rows.fitted)

    def see(self, layer: MoELayer, routed: Routed, counted: torch.Tensor | None, batch: Batch) -> None:
        """Keep what a layer sees."""
        self._seen.keep(layer, routed, counted, batch)

    def work(self, block: Block) -> Iterator[Turn]:
        """Decompose."""
        for layer in self.chosen(block):
            inputs: LayerInputs = self._seen.joined(layer.name)
            ranks = layer_ranks([layer], self.config)[0] if self.ranks is None else self.ranks[layer.original_name]
            decompose_compactly(layer.container, ranks, self.config, inputs)
        yield from ()


@dataclass
class Weighing(Stage):
    """Tells the squared singular values of layers, by which ranks compete, and changes nothing."""

    def work(self, block: Block) -> Iterator[Turn]:
        """Tell."""
        for layer in self.chosen(block):
            self.told[layer.original_name] = {name: values.tolist() for name, values in spectra_of(layer).items()}
        yield from ()


@dataclass
class Quantizing(Fitting):
    """Stores experts in few bits, with a repair of the output matrices where `repair` says so."""

    bits: QuantizationConfig = field(default_factory=QuantizationConfig)
    repair: RepairConfig | None = None
    statistics: RoutingStatistics | None = None
    batches: int = 0  # that are fitted to

    def work(self, block: Block) -> Iterator[Turn]:
        """Quantize."""
        _convert(block, self.chosen(block))
        for layer in self.chosen(block):
            original, theirs, ours = yield from self.inputs(layer, block, self.batches)
            with original.open() as weights:
                fit = LayerFit(layer.name, layer.container, weights, ours, theirs, map_of_fit(layer))
                sums = Sums() if self.statistics is None else self.statistics[layer.original_name]
                self.told[layer.name] = asdict(quantize_fit(layer, fit, self.bits, self.repair, sums))

    @property
    def fitted(self) -> dict[str, Fitted]:
        """What each layer's output matrices were refitted to, where they were."""
        return {name: Fitted(**values) for name, values in self.told.items()} if self.repair else {}


@dataclass
class Storing(Fitting):
    """Fits, rounds and stores layers as chosen for a size, where nothing follows."""

    choices: Mapping[str, Choice] = field(default_factory=dict)
    bits: Sequence[int] = ()  # that experts of a layer share out

    def work(self, block: Block) -> Iterator[Turn]:
        """Store."""
        _convert(block, [layer for layer in self.chosen(block) if is_converted(self.choices[layer.original_name])])
        for layer in self.chosen(block):
            original, theirs, ours = yield from self.inputs(layer, block, None)
            gain, fit = store_layer(
                (layer, original), ours, theirs, self.choices[original.name], self.config, self.bits
            )
            self.told[original.name] = {"name": layer.name, "gain": gain, "fit": fit and asdict(fit)}

    @property
    def gains(self) -> dict[str, float]:
        """What is left of the errors of rounding where experts share out the bits of a layer, by its name before."""
        return {name: told["gain"] for name, told in self.told.items() if told["gain"] is not None}

    @property
    def fitted(self) -> dict[str, Fitted]:
        """What each layer's output matrices were fitted to, where they were."""
        return {told["name"]: Fitted(**told["fit"]) for told in self.told.values() if told["fit"]}
