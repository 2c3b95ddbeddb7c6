"""Which stages follow each other, for what is asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import layers_to_decompose
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import RepairReport
from hf_mcsmoe.repair.rows import Fitted
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import known_sums
from hf_mcsmoe.streamed.parts import Stage
from hf_mcsmoe.streamed.stages import Converting, Decomposing, Merging, Quantizing, Repairing, Sparsifying


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the merge."""

    repair: RepairConfig | None = None
    low_rank: LoSparseConfig | None = None
    quantization: QuantizationConfig | None = None
    sparsity: SparsityConfig | None = None
    size: SizeConfig | None = None

    @property
    def stages(self) -> dict[str, Any]:
        """All of it but a size, by name."""
        return {name: value for name, value in vars(self).items() if name != "size"}

    def fitting_streams(self, config: MergeConfig) -> int:
        """Return how many streams beside the original's the rows that are fitted to pass in, at most.

        Where a fit follows what comes before it, or a router may be cut, it sees what its own stream brings.
        """
        is_cut = "prune" in self.size.reductions if self.size else may_be_cut(config)
        before = sum(map(bool, (self.low_rank, self.sparsity)))  # each of which reads the stream before it
        if not (is_cut or (self.repair and self.repair.sequential)):
            return before
        return 2 if self.size else before + sum(map(bool, (self.repair, self.quantization)))

    @property
    def is_stored(self) -> bool:
        """Whether experts are stored otherwise than dense."""
        return bool(self.low_rank or self.quantization or self.sparsity)


def may_be_cut(config: MergeConfig) -> bool:
    """Tell whether a merge may leave routers without some of their rows."""
    return config.reduce != "merge" or config.cuts_router


class Chain:
    """The stages of one compression, in the order of `compress`."""

    def __init__(
        self,
        layers: Layers,
        plan: MergePlan,
        statistics: RoutingStatistics,
        asked: Asked,
        ranks: Mapping[str, dict[str, int]] | None = None,
    ) -> None:
        """Choose the stages, and the layers of each.

        Args:
            ranks: of low rank, by the layer's name before; None where each layer's follow from it alone.
        """
        self.asked, self.statistics, self.stages, self.ranks = asked, statistics, list[Stage](), ranks
        self.merged = [name for name, item in plan.layers.items() if not item.is_whole]
        self.planned = layers.only([layer for layer in layers if layer.name in plan.layers])
        self.cut = any(item.kept is not None for item in plan.layers.values())
        self.repairs: list[Repairing] = []
        self.stages.append(Merging("merged", self.merged, "merged" if self.merged else "", statistics=statistics))
        is_merged = bool(self.merged)
        if asked.sparsity and asked.sparsity.is_units:
            self._convert(layers.names)
            self._sparsify(layers, asked.sparsity, plan)
            self.merged, self.planned = layers.names, layers  # all in the form of merged ones
        if asked.repair and self.merged:
            self._repair("repaired", self.merged, "repaired")
        if asked.sparsity and not asked.sparsity.is_units:
            self._sparsify(layers, asked.sparsity, plan)
        if asked.low_rank:
            self._low_rank(asked.low_rank)
        if asked.quantization:
            self._quantize(asked.quantization)
        self.stages[-1].is_counted = True
        self.stages[0].is_counted = self.stages[0].is_counted or (asked.is_stored and is_merged)

    def _convert(self, names: list[str]) -> None:
        if set(names) - set(self.merged):
            self.stages.append(Converting("converted", names))

    def _sparsify(self, layers: Layers, config: SparsityConfig, plan: MergePlan) -> None:
        chosen = layers.selected(config.skip)
        kept = all(name not in plan.layers or plan.layers[name].is_whole for name in chosen.names)
        known = known_sums(chosen, self.statistics if kept else None, SCORE.needs(config.score))
        self.stages.append(Sparsifying("sparse", chosen.names, "sparse", config=config, known=known))

    def _repair(self, stream: str, names: list[str], judged: str) -> None:
        options: dict[str, Any] = {"config": self.asked.repair, "may_be_cut": self.cut}
        self.repairs.append(Repairing(stream, names, judged, **options))
        self.stages.append(self.repairs[-1])

    def _low_rank(self, config: LoSparseConfig) -> None:
        repair = self.asked.repair
        names = layers_to_decompose(self.planned, config.skip).names
        self._convert(names)
        is_last = not (repair and repair.method == "local")
        judged = "low rank" if is_last else ""
        self.stages.append(Decomposing("low rank", names, judged, config=config, ranks=self.ranks))
        if not is_last:  # once more, with what is stored now
            self._repair("second repair", sorted({*names, *self.merged}, key=self.planned.names.index), "low rank")

    def _quantize(self, config: QuantizationConfig) -> None:
        names = self.planned.selected(config.skip).names
        options: dict[str, Any] = {"config": self.asked.repair or RepairConfig(), "may_be_cut": self.cut}
        options |= {"bits": config, "repair": self.asked.repair, "statistics": self.statistics}
        self.stages.append(Quantizing("quantized", names, "quantized", **options))

    def begin(self, batches: int) -> None:
        """Begin, with so many batches that are fitted to."""
        for stage in self.stages:
            if isinstance(stage, Quantizing):
                stage.batches = batches

    def report(self, rows: int) -> RepairReport | None:
        """Return what the last repair did, on so many sequences; None where there was none."""
        return self.repairs[-1].report(rows) if self.repairs else None

    @property
    def refitted(self) -> dict[str, Fitted]:
        """What output matrices in few bits were refitted to."""
        return {
            name: fit for stage in self.stages if isinstance(stage, Quantizing) for name, fit in stage.fitted.items()
        }
