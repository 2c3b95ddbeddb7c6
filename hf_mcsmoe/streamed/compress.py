"""The story from folder to folder: statistics, plan, and one sweep that merges, repairs and stores block by block."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.card import attach_record, new_record
from hf_mcsmoe.compress import by_name, checked_on, sampled, with_steps
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs, with_flops
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.output import check_apart
from hf_mcsmoe.layers.packing import apart, unpacked
from hf_mcsmoe.layers.shards import ShardWriter
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder
from hf_mcsmoe.options import all_needs, check_options, check_repair, chosen_repair
from hf_mcsmoe.plan import MergePlan, plan_merge
from hf_mcsmoe.progress import Progress, counted, in_parts, one_step, silent
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.record import Costs, Record
from hf_mcsmoe.repair.made import made_batches
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.rows import few_rows
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.streamed.chain import Asked, Chain
from hf_mcsmoe.streamed.parts import ORIGINAL, Rows
from hf_mcsmoe.streamed.refused import check_streamed
from hf_mcsmoe.streamed.student import Student, merged_costs
from hf_mcsmoe.streamed.sweep import Sweep


def compress_folder(
    source: str | os.PathLike | Folder,
    output: str | os.PathLike,
    batches: Iterable[Batch],
    config: MergeConfig | None = None,
    *,
    repair: RepairConfig | None = None,
    low_rank: LoSparseConfig | None = None,
    quantization: QuantizationConfig | None = None,
    sparsity: SparsityConfig | None = None,
    statistics: RoutingStatistics | None = None,
    progress: Progress | None = None,
    held_out: Iterable[Batch] | None = None,
    check: Iterable[Batch] | Mapping[str, Iterable[Batch]] | None = None,
) -> None:
    """Write the folder that `compress` and `save_pretrained` would, with no more than one block in memory.

    Args:
        source: the checkpoint to be compressed.
        output: the folder to be written; it is complete or not there.
        batches: as for `compress`, and so are all further options.

    Raises:
        ValueError: see `compress`; what needs the whole model at once, see `check_streamed`; an output that is the
            source or lies in it.
    """
    folder = source if isinstance(source, Folder) else Folder(source)
    path = Path(os.path.realpath(output))
    check_apart(path, {"the model": folder.model.name_or_path})
    layers, config, tell = Layers.of(folder).uncompressed(), config or MergeConfig(), progress or silent
    asked = Asked(chosen_repair(repair), low_rank, quantization, sparsity)
    check_options(layers, config, **vars(asked))
    check_streamed(layers, config, asked, statistics)
    folder.model.requires_grad_(False)
    batches, sample = sampled(as_batches(batches, layers.model), keep=True)
    kinds = {name: list(part) for name, part in by_name(check).items()}
    judge = Judge(list(held_out or ()), [batch for part in kinds.values() for batch in part])
    if statistics is None:
        needs = of_data(all_needs(config, None, quantization))
        statistics = collect_statistics(layers, counted(batches, "statistics", tell), needs)
    with one_step("planning", tell):
        plan = plan_merge(layers, statistics, config)
    with completed_folder(path) as target:
        writer = ShardWriter(target, folder)
        run = _Run(layers, plan, statistics, asked, cast(Sequence[Batch], batches), sample)
        student, record = run.swept(judge, writer, tell)
        attach_record(student, replace(record, calibration=checked_on(kinds)).with_quality(judge.quality))
        writer.write_rest(student)
        cast(Any, student)._save_into(path, target, path.name, state_dict={})
        writer.close()


class _Run:
    """One run of the second sweep."""

    def __init__(
        self,
        layers: Layers,
        plan: MergePlan,
        statistics: RoutingStatistics,
        asked: Asked,
        batches: Sequence[Batch],
        sample: Batch | None,
    ) -> None:
        self.layers, self.plan, self.asked, self.batches = layers, plan, asked, batches
        self.sample = sample and unpacked(sample, encoder_decoder=layers.model.config.is_encoder_decoder)
        self.is_merged = any(not item.is_whole for item in plan.layers.values())
        check_repair(self.is_merged, **vars(asked))
        self.chain = Chain(layers, plan, statistics, asked)

    def rows(self) -> Rows:
        """Return what passes the blocks."""
        model, repair = self.layers.model, self.asked.repair
        fitted = list(apart(model, self.batches))
        made = made_batches(model, self.batches, repair.made, repair.seed) if repair else []
        return Rows(fitted, list(apart(model, made)), self.sample)

    def swept(self, judge: Judge, writer: ShardWriter, tell: Progress) -> tuple[PreTrainedModel, Record]:
        """Sweep, and return the student without weights and its record, but for what was measured."""
        student, rows = Student(self.layers, self.plan), self.rows()
        judge.progress = in_parts("measuring", tell, 1 + sum(bool(stage.judged) for stage in self.chain.stages))
        self.chain.begin(student, len(rows.fitted))
        sweep = Sweep(cast(Folder, self.layers.source), student, self.chain.stages, rows, judge)
        sweep.run(lambda path, module: writer.write_all(path, module, student.names))
        write_description(student.model, keep=self.asked.low_rank.keep if self.asked.low_rank else None)
        record = replace(new_record(student.model, self.plan.to_dict()), costs=self.costs(sweep))
        report = self.chain.report(sum(map(num_sequences, self.batches)))
        few = few_rows(self.chain.refitted, sum(map(num_sequences, self.batches)))
        asked = self.asked
        record = with_steps(record, student.model, report, asked.low_rank, asked.quantization, asked.sparsity, few)
        return student.model, record

    def costs(self, sweep: Sweep) -> dict[str, Costs]:
        """Return what the original, the merged model and the result cost."""
        before, last = account(self.layers), self.chain.stages[-1].stream
        costs = {"before": replace(before, bytes_on_disk=folder_bytes(self.layers.model.name_or_path))}
        model = sweep.student.model
        if self.asked.is_stored and self.is_merged:
            costs["merged"] = merged_costs(self.layers, self.plan)
        name = "compressed" if self.asked.is_stored else "merged" if self.is_merged else "after"
        costs[name] = replace(account(model), bytes_on_disk=saved_costs(model).bytes_on_disk)
        streams = dict(zip(costs, [ORIGINAL, self.chain.stages[0].stream][: len(costs) - 1] + [last], strict=True))
        return {name: self._with_flops(value, sweep, streams[name]) for name, value in costs.items()}

    def _with_flops(self, costs: Costs, sweep: Sweep, stream: str) -> Costs:
        if self.sample is None:
            return costs
        counting = sweep.counts[stream]
        return with_flops(costs, self.layers.model, self.sample, counting.counter.get_total_flops(), counting.experts)
