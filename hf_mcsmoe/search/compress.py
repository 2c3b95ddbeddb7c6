"""A model of a size: statistics and curves, the choice, its check against the best single method, and the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, new_record
from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.calibration.inputs import num_sequences
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.evaluation.costs import account, folder_bytes, saved_costs
from hf_mcsmoe.evaluation.held_out import judge_of
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.merge import merge_layers
from hf_mcsmoe.methods.choice import BITS, Choice
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.progress import Progress, counted, in_parts, silent
from hf_mcsmoe.record import Calibration, Predicted, Quality, Record, SizeChoice, Step
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.apply import plan_choices, store_choices
from hf_mcsmoe.search.choices import Chosen, best_single, check_reachable, choice_bytes, choose, fixed_bytes
from hf_mcsmoe.search.conditions import check_curves, conditions
from hf_mcsmoe.search.config import JOINT, NOTHING, SizeConfig
from hf_mcsmoe.search.curves import check_sums, measure_curves, needs_of
from hf_mcsmoe.search.ladder import predicted_ladder
from hf_mcsmoe.search.reason import reason
from hf_mcsmoe.search.size import bytes_of

MIXTURE = "mixture"


@dataclass(frozen=True)
class Sized:
    """A result: the model, its plan, what was chosen, how it does where rows were held out, and a word on few rows."""

    model: PreTrainedModel
    plan: MergePlan
    chosen: Chosen
    quality: Quality | None = None
    few_rows: str | None = None

    @property
    def effect(self) -> float:
        """The divergence from the original, all kinds of text alike; where none was measured, the predicted one."""
        known = [] if self.quality is None else [self.quality.kl, self.quality.check_kl]
        measured = [value for value in known if value is not None]
        return sum(measured) / len(measured) if measured else sum(self.chosen.predicted.values())


def source_bytes(layers: Layers) -> int:
    """Return the bytes of the source's weight files; of a model that has none on disk, as it would be saved.

    Files of the Hub that a `Folder` reads count as those of a folder do.
    """
    if isinstance(layers.source, Folder):
        return layers.source.file_bytes
    return folder_bytes(layers.model.name_or_path) or saved_bytes(layers)


def saved_bytes(layers: Layers) -> int:
    """Return the bytes of the weight files that a model would be saved in as it is."""
    return fixed_bytes(layers, ()) + sum(
        choice_bytes(shared[0], Choice(shared[0].num_experts)) for shared in layers.tied
    )


def check_size(layers: Layers, merge: MergeConfig, search: SizeConfig) -> int:
    """Return the bytes that are asked for, checked from shapes alone, before any forward and without weights.

    Raises:
        ValueError: no size, one that cannot be reached, or one for which nothing is to be done; bits that are named
            for layers that cannot be stored in few.
    """
    shared = next((tied for tied in layers.selected(merge.skip).tied if len(tied) > 1), None)
    if shared and search.bits != BITS:
        raise ValueError(
            f"{', '.join(layer.name for layer in shared)} share their experts and cannot be stored in few bits, so "
            f"bits={search.bits!r} cannot be kept to: leave it out, or name these layers in `skip`."
        )
    limit = bytes_of(search.size, source_bytes(layers))
    check_reachable(layers, search, limit, merge.skip)
    return limit


def compress_to_size(
    layers: Layers,
    batches: Sequence[Batch],
    merge: MergeConfig,
    search: SizeConfig,
    *,
    repair: RepairConfig | None = None,
    statistics: RoutingStatistics | None = None,
    progress: Progress = silent,
    repetitions: int = 0,
    held_out: Iterable[Batch] = (),
    check: Mapping[str, Sequence[Batch]] | None = None,
) -> PreTrainedModel:
    """Return the model that the search for a size ends with, with its record; the original stays as it is.

    The mixture that the curves choose is compared with the best single method of the same bytes, on rows that nothing
    was fitted to; up to two results are held in memory beside the original.

    Args:
        repair: how output matrices are fitted, jointly unless it says refit or none.
        progress: see `compress`.

    Raises:
        ValueError: see `check_size`, `check_sums` and `check_curves`; no batches.
    """
    limit, repair = check_size(layers, merge, search), repair or JOINT
    if not batches:
        raise ValueError("The calibration set is empty: pass at least one batch; a size is chosen by what it costs.")
    if statistics is None:
        statistics = collect_statistics(layers, counted(batches, "statistics", progress), needs_of(merge, search))
    check_sums(statistics, merge, search)
    check_curves(layers, statistics, merge, search, repair)
    sample, kinds = batches[len(batches) // 2], check or {}
    before = replace(account(layers, sample, repetitions=repetitions), bytes_on_disk=source_bytes(layers))
    judge = judge_of(layers.model, held_out, chain(*kinds.values()), in_parts("measuring", progress, 3))
    if not statistics.curves:  # which whoever gave the statistics may keep with them
        told = _by_number("curves", progress)
        statistics.curves = measure_curves(layers, statistics, batches, merge, search, repair=repair, progress=told)
        statistics.conditions = conditions(merge, search, repair)
    curves = statistics.curves
    results: dict[str, Sized] = {}
    for name, chosen in compared(layers, curves, search, limit, merge.skip).items():
        plan = plan_choices(layers, statistics, merge, chosen.choices)
        model = merge_layers(layers, plan, statistics=statistics)
        told, bits = _by_number("fit", progress), shared_bits(name, search)
        stored = store_choices(Layers.of(model), layers, batches, chosen.choices, repair, told, bits)
        chosen = replace(chosen, predicted=after_balance(chosen, curves, stored.gains))
        judge.measure(name, model)
        results[name] = Sized(model, plan, chosen, judge.quality.pop(name, None), stored.few_rows)
    taken = best_of(results)
    best = results[taken]
    if best.quality is not None:
        judge.quality["compressed"] = best.quality
    after = replace(
        account(best.model, sample, repetitions=repetitions), bytes_on_disk=saved_costs(best.model).bytes_on_disk
    )
    record = record_of_size(layers, results, taken, curves, merge, search, repair)
    rows = sum(num_sequences(batch) for part in kinds.values() for batch in part)
    calibration = Calibration(check=list(kinds), check_rows=rows)
    record = replace(record, costs={"before": before, "compressed": after}, calibration=calibration)
    attach_record(best.model, record.with_quality(judge.quality))
    return best.model


def compared(
    layers: Layers, curves: Mapping[str, LayerCurves], search: SizeConfig, limit: int, skip: Sequence[str]
) -> dict[str, Chosen]:
    """Return what is tried for a size, by name: the mixture that the curves choose, and the best single method."""
    mixture = choose(layers, curves, search, limit, skip)
    return {MIXTURE: mixture, **best_single(layers, curves, search, limit, skip)}


def shared_bits(name: str, search: SizeConfig) -> Sequence[int]:
    """Return the bits that experts of a layer share out in what is tried: none of a single method, or all alike."""
    return search.bits if name == MIXTURE and search.alike == NOTHING else ()


def best_of(results: Mapping[str, Sized]) -> str:
    """Return the name of the result of least effect."""
    return min(results, key=lambda name: results[name].effect)


def record_of_size(
    layers: Layers,
    results: Mapping[str, Sized],
    taken: str,
    curves: Mapping[str, LayerCurves],
    merge: MergeConfig,
    search: SizeConfig,
    repair: RepairConfig,
) -> Record:
    """Return the record of the result that is taken, but for costs, data and quality."""
    best, source = results[taken], source_bytes(layers)
    limit = bytes_of(search.size, source)
    checked = {name: result.effect for name, result in results.items() if result.quality is not None}
    rungs = predicted_ladder(layers, curves, search, source, merge.skip)
    size = SizeChoice(
        source,
        limit,
        best.chosen.bytes,
        best.chosen.predicted,
        taken,
        checked,
        reason(curves, best.chosen.choices, limit, best.chosen.bytes),
        [Predicted(rung.method, rung.chosen.bytes, rung.effect) for rung in rungs if rung.effect is not None],
    )
    record = replace(new_record(best.model, best.plan.to_dict()), size=size)
    if few := best.few_rows:
        done = "Output matrices were fitted to the original layers on the calibration data."
        record = record.with_step(Step("Repair", repair.to_dict(), [done, "", few], {"few_rows": few}))
    return record


def after_balance(chosen: Chosen, curves: Mapping[str, LayerCurves], gains: Mapping[str, float]) -> dict[str, float]:
    """Return the predicted effect of each layer whose experts share out their bits: of rounding's, so much is left."""
    effects = dict(chosen.predicted)
    for name, gain in gains.items():
        choice = chosen.choices[name]
        reduction = curves[name].reduction_effect(choice.reduce, choice.experts)
        effects[name] = reduction + gain * (effects[name] - reduction)
    return effects


def _by_number(stage: str, progress: Progress) -> Callable[[str, int, int], None]:
    return lambda name, done, total: progress(stage, done, total)
