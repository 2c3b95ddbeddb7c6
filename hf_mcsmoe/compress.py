"""The story from top to bottom: statistics, plan, merge (M-SMoE), repair, low rank + sparse (MC-SMoE), bits, zeros."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, new_record
from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.reference import check_reference, reference_norms, with_reference
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs
from hf_mcsmoe.evaluation.held_out import Judge, judge_of
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.memory import align
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.layers.whole import convert_whole
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact_layers, decompose_layers, low_rank_step
from hf_mcsmoe.merge import check_loaded, merge_layers
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import of_data
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.options import all_needs, check_kinds, check_options, check_repair, chosen_repair, sparsity_needs
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.progress import Progress, counted, in_parts, one_step, silent
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.quantization.quantize import quantization_step, quantize_layers
from hf_mcsmoe.record import Calibration, Costs, Record, Step
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import RepairReport, repair_experts
from hf_mcsmoe.search.budget import measured_plan
from hf_mcsmoe.search.compress import compress_to_size
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import sparsify_layers, sparsity_step


def compress(
    model: PreTrainedModel | Layers,
    batches: Iterable[Batch],
    config: MergeConfig | None = None,
    *,
    repair: RepairConfig | None = None,
    low_rank: LoSparseConfig | None = None,
    quantization: QuantizationConfig | None = None,
    sparsity: SparsityConfig | None = None,
    consume: bool = False,
    statistics: RoutingStatistics | None = None,
    progress: Progress | None = None,
    repetitions: int = 0,
    held_out: Iterable[Batch] | None = None,
    check: Iterable[Batch] | Mapping[str, Iterable[Batch]] | None = None,
    size: SizeConfig | str | float | None = None,
    base_model: str | Path | None = None,
) -> PreTrainedModel:
    """Return `model` with merged experts: statistics over `batches`, plan, merge (paper, section 3.1).

    Then merged layers are repaired and stored as low rank + sparse (section 3.2), and experts, merged or not, in few
    bits, where that is asked for. The record tells what was done and what each stage holds, and what it executes in a
    forward of one batch: the first, of a list that in the middle.

    Args:
        batches: dictionaries for `model(**batch)`; may be empty where `statistics` are given and nothing else needs
            them.
        repair: how merged layers are fitted to the original ones; None leaves them as merged (on the command line
            the default is `RepairConfig()`, for there the original is at hand until the end). For a `size` None is
            the joint refit, and "refit" and "none" are all else that can be.
        low_rank: how merged experts are stored as low rank + sparse; None leaves them dense.
        quantization: in how many bits experts are stored; with a `repair`, output matrices are fitted once more to
            what W_in has become. None leaves their values as they are.
        sparsity: which weights or hidden units inside experts, merged or not, are left out: hidden units before the
            repair, single weights after it; these go with neither `low_rank` nor `quantization`. None for none.
        consume: see `merge_experts`; not together with `repair`, which needs the original, nor with what may be
            refused only after the merge (`LoSparseConfig(energy=...)` without `allow_dense`).
        statistics: sums that were collected before, instead of a pass over `batches`.
        progress: called as `progress(stage, done, total)` in the stages "checking" (of weights, one step),
            "statistics" (batches; the total is None for an iterator), "planning" (one step), "costs" (times that they
            are counted), "measuring" (held-out batches), "merge" and "repair" (layers), "low rank" (matrices), "second
            repair" (of what is stored then), "sparsity" and "quantization" (layers). Stages overlap; each counts up
            from 0 to its total.
        repetitions: forwards to time in each stage, of which the fastest counts; none by default.
        held_out: batches like `batches`, but of other rows: nothing is fitted to them, and the record tells each
            stage's loss on them and its divergence from the original.
        check: batches of text of another kind, by name where there are several kinds: nothing is fitted to them
            either, and the same is told of them, apart.
        size: of the weight files, as text (20GB) or a share of the source's: experts and bits are chosen for it by
            measured effect, layer by layer; of `config` the methods and `skip` count, not how many experts. Further
            stages are then "curves" and "fit" (layers).
        base_model: folder or Hub id of the checkpoint that the model was trained from, for methods that compare with
            it ("router_norm_change"); only its routers are read.

    Raises:
        ValueError: see `check_options`, `check_reference`, `reference_norms`, `collect_statistics`, `plan_merge`,
            `merge_experts`, `repair_experts` and `decompose_experts`. Options are checked before any forward; only
            ranks by `energy` that make an expert larger, and a repair where an adaptive budget kept all experts, are
            refused later, with `model` unchanged.
    """
    check_kinds(config, repair, low_rank, quantization, sparsity, statistics)
    config, search = config or MergeConfig(), SizeConfig.of(size)
    repair = repair if search else chosen_repair(repair)
    layers = Layers.of(model).uncompressed()
    stages: dict[str, Any] = {"repair": repair, "low_rank": low_rank, "quantization": quantization}
    stages["sparsity"] = sparsity
    check_loaded(layers)
    check_whole(layers.model, "a compression")
    if isinstance(layers.source, InMemory):
        align(layers.model)
    check_options(layers, config, **stages, consume=consume, size=search)
    needs = (*all_needs(config, search, quantization), *sparsity_needs(layers, config, sparsity))
    check_reference(needs, base_model, statistics)
    norms = None if base_model is None else reference_norms(layers, base_model)
    batches = as_batches(batches, layers.model)
    tell = progress or silent
    with one_step("checking", tell):
        check_weights(layers.source)
    kinds = {name: list(part) for name, part in by_name(check).items()}
    take = partial(_statistics, layers, needs=needs, held=statistics, norms=norms, tell=tell)
    if search:
        batches = list(batches)
        sums = take(batches) if norms else statistics
        options: dict[str, Any] = {"statistics": sums, "progress": tell, "repetitions": repetitions}
        options |= {"repair": repair, "held_out": held_out or (), "check": kinds}
        return compress_to_size(layers, batches, config, search, **options)
    batches, sample = sampled(batches, keep=config.budget == MEASURED or any(stages.values()))
    statistics = take(batches)
    plan = _planned(layers, statistics, batches, config, repair, tell)
    number = sum(not layer.is_whole for layer in plan.layers.values())
    is_merged = number > 0
    check_repair(is_merged, **stages)
    stored = bool(low_rank or quantization or sparsity)
    is_fitted = is_merged or bool(sparsity and sparsity.is_units)
    count = in_parts("costs", tell, 2 + (stored and is_merged))
    measure = partial(_counted_costs, batch=sample, repetitions=repetitions if sample else 0, tell=count)
    costs = {"before": replace(measure(layers), bytes_on_disk=folder_bytes(layers.model.name_or_path))}
    judged = 1 + is_merged + bool(repair and is_fitted) + sum(map(bool, (low_rank, quantization, sparsity)))
    judge = judge_of(layers.model, held_out, chain(*kinds.values()), in_parts("measuring", tell, judged))

    tell("merge", 0, number)
    merged = merge_layers(layers, plan, statistics=statistics, consume=consume, progress=by_number("merge", tell))
    found = Layers.of(merged)
    record, report, few = new_record(merged, plan.to_dict()), None, None

    def fit(stage: str) -> RepairReport:
        return repair_experts(found, layers, batches, repair, progress=by_number(stage, tell))

    if is_merged:
        judge.measure("merged", merged)
    costs |= {"merged": _measured(found, measure)} if stored and is_merged else {}
    found = _sparse(found, sparsity, batches, tell, judge, statistics, units=True)
    if repair and is_fitted:
        report = fit("repair")
        judge.measure("repaired", merged)
    found = _sparse(found, sparsity, batches, tell, judge, statistics, units=False)
    if low_rank:
        found = _store(found, low_rank, batches, tell)
        if repair and repair.method == "local":  # once more, with what is stored now
            report = fit("second repair")
        judge.measure("low rank", merged)
    if quantization:
        original = None if consume else layers
        told = by_number("quantization", tell)
        found, few = quantize_layers(
            found, original, batches, quantization, repair=repair, progress=told, statistics=statistics
        )
        judge.measure("quantized", merged)
    costs["compressed" if stored else "merged" if is_merged else "after"] = _measured(found, measure)
    record = with_steps(record, merged, report, low_rank, quantization, sparsity, few)
    record = replace(record, costs=costs, calibration=checked_on(kinds))
    attach_record(merged, record.with_quality(judge.quality))
    return merged


def with_steps(
    record: Record,
    merged: PreTrainedModel,
    report: RepairReport | None,
    low_rank: LoSparseConfig | None,
    quantization: QuantizationConfig | None,
    sparsity: SparsityConfig | None,
    few: str | None,
) -> Record:
    """Return a record with what was done after the merge; what could not be done is a warning as well.

    Args:
        merged: the result.
        few: tells of too few rows for the repair of quantized experts.
    """
    few = None if report and report.few_rows() else few  # which is told once
    steps = [*_sparsity_steps(sparsity), *_repair_steps(report), *_low_rank_steps(merged, low_rank)]
    for step in [*steps, *_quantization_steps(quantization, few)]:
        record = record.with_step(step)
    return record


def checked_on(kinds: Mapping[str, Sequence[Batch]]) -> Calibration:
    """Return what a record tells of text of other kinds."""
    return Calibration(check=list(kinds), check_rows=sum(num_sequences(x) for part in kinds.values() for x in part))


def _statistics(
    layers: Layers,
    batches: Iterable[Batch],
    *,
    needs: Sequence[str],
    held: RoutingStatistics | None,
    norms: Mapping[str, torch.Tensor] | None,
    tell: Progress,
) -> RoutingStatistics:
    """Return the statistics that are held, or those of a pass, with what the routers' norms before tell."""
    if held is None:
        held = collect_statistics(layers, counted(batches, "statistics", tell), of_data(needs))
    return held if norms is None else with_reference(held, layers, norms)


def _planned(
    layers: Layers,
    statistics: RoutingStatistics,
    batches: Iterable[Batch],
    config: MergeConfig,
    repair: RepairConfig | None,
    tell: Progress,
) -> MergePlan:
    if config.budget == MEASURED:
        return measured_plan(layers, statistics, list(batches), config, repair, by_number("curves", tell))
    with one_step("planning", tell):
        return plan_merge(layers, statistics, config)


def by_name(check: Iterable[Batch] | Mapping[str, Iterable[Batch]] | None) -> Mapping[str, Iterable[Batch]]:
    """Return batches of other kinds of text by their names."""
    if check is None or isinstance(check, Mapping):
        return check or {}
    return {"text of another kind": check}


def _sparse(
    layers: Layers,
    config: SparsityConfig | None,
    batches: Iterable[Batch],
    tell: Progress,
    judge: Judge,
    statistics: RoutingStatistics,
    *,
    units: bool,
) -> Layers:
    """Leave out what `config` says, of layers that kept all their experts too; return the layers as they are then.

    Args:
        units: whether it is the turn of hidden units, or that of single weights.
    """
    if config is None or config.is_units != units:
        return layers
    if units:  # all in the form of merged ones, which a repair takes
        for layer in layers:
            if not layer.merged:
                convert_whole(layers.model, layer)
        layers = Layers.of(layers.source)
    done = sparsify_layers(layers, list(batches), config, by_number("sparsity", tell), statistics)
    write_description(done.model)
    judge.measure("sparse", done.model)
    return done


def _sparsity_steps(config: SparsityConfig | None) -> list[Step]:
    """Return what the record tells of what was left out inside experts."""
    return [] if config is None else [sparsity_step(config)]


def sampled(batches: Iterable[Batch], *, keep: bool) -> tuple[Iterable[Batch], Batch | None]:
    """Return the batches, as a list to read more than once with `keep`, and one of them to measure costs on.

    Raises:
        ValueError: there is none to read more than once.
    """
    if isinstance(batches, Sequence):
        first, sample = [], batches[len(batches) // 2] if batches else None
    else:
        batches = iter(batches)
        first = list(islice(batches, 1))
        sample = first[0] if first else None
    if keep and sample is None:
        raise ValueError(
            "The calibration set is empty: pass at least one batch; repair, low_rank and quantization read it."
        )
    if isinstance(batches, Sequence):
        return batches, sample
    return [*first, *batches] if keep else chain(first, batches), sample


def by_number(stage: str, progress: Progress) -> Callable[[str, int, int], None]:
    """Return what tells of a stage's layers, by their number."""
    return lambda name, done, total: progress(stage, done, total)


def _counted_costs(
    layers: Layers, *, batch: Batch | None, repetitions: int, tell: Callable[[int, int], None]
) -> Costs:
    """Return what a model costs, and tell before and after."""
    tell(0, 1)
    costs = account(layers, batch, repetitions=repetitions)
    tell(1, 1)
    return costs


def _store(layers: Layers, config: LoSparseConfig, batches: Iterable[Batch], progress: Progress) -> Layers:
    """Store the experts as low rank + sparse, in the compact form; return the layers as they are then."""
    layers = decompose_layers(layers, config, batches, prune=True, progress=by_number("low rank", progress))
    if sparse_parts(layers.model):  # or all of it was to stay dense
        compact_layers(layers.model)
    return layers


def _measured(merged: Layers, measure: Callable[[Layers], Costs]) -> Costs:
    return replace(measure(merged), bytes_on_disk=saved_costs(merged.model).bytes_on_disk)


def _repair_steps(report: RepairReport | None) -> list[Step]:
    """Return what the record tells of a repair; what that could not do is a warning as well."""
    if report is None:
        return []
    if shortfall := report.shortfall():
        warnings.warn(f"{shortfall} Calibrate on more text, or leave them so.", stacklevel=4)
    return [report.step()]


def _low_rank_steps(merged: PreTrainedModel, config: LoSparseConfig | None) -> list[Step]:
    """Return what the record tells of how experts are stored; where none is smaller so, warn instead."""
    if config is None:
        return []
    step = low_rank_step(merged, config)
    if step is None:
        warnings.warn(
            f"keep={config.keep} and the ranks asked for make no expert smaller, so all stay dense: lower them.",
            stacklevel=4,
        )
    return [] if step is None else [step]


def _quantization_steps(config: QuantizationConfig | None, few: str | None) -> list[Step]:
    """Return what the record tells of bits."""
    return [] if config is None else [quantization_step(config, few)]
