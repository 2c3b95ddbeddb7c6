"""The story from folder to folder: statistics, plan, and one sweep that merges, repairs and stores block by block."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record
from hf_mcsmoe.calibration.reference import check_reference, reference_norms, with_reference
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compress import by_name, checked_on, sampled
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.held_out import Judge
from hf_mcsmoe.export.checkpoint import export, kept_sentence
from hf_mcsmoe.export.sized import plain_bytes, plain_size
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.output import check_apart, check_room
from hf_mcsmoe.layers.shards import ShardWriter, as_stored
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import gradient_names, of_data
from hf_mcsmoe.modeling.folders_mcsmoe import completed_folder, working_folder
from hf_mcsmoe.modeling.plain_mcsmoe import plain_form
from hf_mcsmoe.options import all_needs, check_kinds, check_options, chosen_repair, sparsity_needs
from hf_mcsmoe.planning import saved_parameters
from hf_mcsmoe.processes import current
from hf_mcsmoe.progress import Progress, silent
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.record import Record
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.budget import Budgeting
from hf_mcsmoe.search.compress import check_size
from hf_mcsmoe.search.conditions import check_curves
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.streamed.budget import compared_bytes
from hf_mcsmoe.streamed.chain import Asked
from hf_mcsmoe.streamed.config import Saving, StreamConfig
from hf_mcsmoe.streamed.data import Data
from hf_mcsmoe.streamed.journal import RESULT, SCORES, Journal, needed_bytes, place_of
from hf_mcsmoe.streamed.planned import made_by_plan
from hf_mcsmoe.streamed.run import Run, description_of, digests_of
from hf_mcsmoe.streamed.sized import made_to_size, with_curves
from hf_mcsmoe.streamed.statistics import first_sweep
from hf_mcsmoe.streamed.trials import trials_bytes

# Where the result lies in the working folder from which another form of it is made.
FORM = "form"
TAKEN = (
    "The result and hidden states of all rows take",
    ": fewer or shorter rows (--num-samples, --max-length) take less",
)


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
    size: SizeConfig | str | float | None = None,
    base_model: str | Path | None = None,
    stream: StreamConfig | None = None,
    saving: Saving | None = None,
) -> Record:
    """Write the folder that `compress` and `save_pretrained` would, with no more than one block in memory.

    A run that was killed goes on where it was when the same is asked for again, and ends with the same bytes. What it
    has finished lies in a hidden folder beside the output until then. Of several processes (see `together`) each runs
    its share of the batches of the first sweep, and the first makes and writes the blocks while the others wait.

    Args:
        source: the checkpoint to be compressed: a folder, or a Hub id, of which a shard is fetched when a block needs
            it.
        output: the folder to be written; it is complete or not there.
        batches: as for `compress`, and so are all further options but the last two.
        stream: how much memory there is for hidden states, whether to begin anew, and what becomes of shards.
        saving: what is saved beside the weights.

    Returns:
        The record that was saved.

    Raises:
        TypeError: see `compress`.
        ValueError: see `compress`; see `check_blocks`; a plain checkpoint that
            the result cannot be, see `plain_size` and `plain_bytes`, or that it turns out not to be when all is done:
            it lies in `output` in our own format then; shards to be dropped that are not this run's; an output that is
            the source or lies in it; an earlier run on the output that was asked for something else; too little memory
            or disk.
    """
    check_kinds(config, repair, low_rank, quantization, sparsity, statistics)
    stream, saving, path = stream or StreamConfig(), saving or Saving(), Path(os.path.realpath(output))
    stream.check_drops(source)
    folder = source if isinstance(source, Folder) else stream.opened(source, path)
    check_apart(path, {"the model": folder.model.name_or_path})
    layers, config = Layers.of(folder).uncompressed(), config or MergeConfig()
    search = SizeConfig.of(size)
    if search and saving.plain:
        search = plain_size(layers, search, saving.plain, config.skip)
    asked = Asked(repair if search else chosen_repair(repair), low_rank, quantization, sparsity, search)
    check_options(layers, config, **vars(asked))
    beside = plain_bytes(layers, config, saving.plain, vars(asked)) if saving.plain else 0
    check_blocks(layers)
    needs = (*all_needs(config, search, quantization), *sparsity_needs(layers, config, sparsity))
    check_reference(needs, base_model, statistics)
    if search and statistics is not None:
        check_curves(layers, statistics, config, search, repair or JOINT)
    norms = None if base_model is None else reference_norms(layers, base_model)
    budget = Budgeting.of(layers, config, asked.repair) if config.budget == MEASURED else None
    reads = statistics is None or budget is not None or any(vars(asked).values())
    batches = as_batches(batches, layers.model)
    given, sample = sampled(list(batches) if search else batches, keep=reads)
    kinds = {name: list(part) for name, part in by_name(check).items()}
    judge = Judge(list(held_out or ()), [batch for part in kinds.values() for batch in part])
    # Of a size each choice is fitted without made rows.
    data, tell = Data(layers.model, list(given), sample, None if search else asked.repair), progress or silent
    hidden, processes = data.hidden_bytes(config, asked, judge), current()
    hidden = max(hidden, compared_bytes(layers, data, config, budget)) if budget else hidden
    is_mapped = stream.check(folder, hidden)
    wanted = description_of(folder, config, asked, [data.batches, judge.batches, judge.check], statistics, norms)
    share = data.share_bytes(processes)
    goes_back = statistics is None and bool(gradient_names(of_data(needs)))
    back = data.back_bytes(layers, processes) if goes_back else 0
    how: dict[str, Any] = {"restart": stream.restart, "mapped": stream.check(folder, max(share, back))}
    sweep = partial(first_sweep, layers, data.batches, needs, place_of(path), wanted, processes, **how)
    tried = None if statistics is not None and statistics.curves else search or (budget and budget.search)

    def lead() -> Record:
        copies = trials_bytes(layers, data.batches, config, tried) if tried else 0
        result = _result_bytes(layers, config, search) + beside
        check_room(path, needed_bytes(path, result, hidden, copies, back, restart=stream.restart), *TAKEN)
        with working_folder(path) as work:
            journal = Journal(work, wanted, restart=stream.restart)
            if folder.snapshot is not None:
                journal.follow(folder.snapshot)
            run = Run(layers, config, asked, data, journal, is_mapped=is_mapped)
            found = run.statistics(statistics, partial(sweep, tell), processes)
            found = found if norms is None else with_reference(found, layers, norms)
            place = 0
            if search:
                found = with_curves(run, found, tell)
                student, record, place = made_to_size(run, found, judge, tell)
            else:
                student, record = made_by_plan(run, found, judge, tell)
            record = replace(record, calibration=checked_on(kinds)).with_quality(judge.quality)
            attach_record(student, saving.told(record))
            writer = run.write_rest(student, place)
            journal.state = RESULT
            record, lost = _placed(student, writer, path, saving, journal.folder / FORM, tell)
            saving.after(path)
            folder.drop_fetched()
            if saving.scores and (statistics is None or search):
                journal.content[SCORES] = digests_of(found)  # a run that goes on knows them for its own
                journal.save()
                found.save(saving.scores)
            journal.remove()
        if lost is not None:
            raise ValueError(kept_sentence(path, lost)) from lost
        return record

    if not processes.is_first and processes.sent(None, 0):
        check_room(
            path, needed_bytes(path, 0, share, back=back), "The hidden states of this process's rows take", TAKEN[1]
        )
        sweep(silent)
    return processes.led(lead)


def _placed(
    student: PreTrainedModel, writer: ShardWriter, path: Path, saving: Saving, ours: Path, tell: Progress
) -> tuple[Record, ValueError | None]:
    """Put a result in its place; returns the record of what lies there, and why it is no plain checkpoint after all.

    Args:
        writer: of the shards of all of it.
        ours: a folder for the result in our own format, where a plain checkpoint is to be made of it.
    """
    if saving.plain is not None:
        shutil.rmtree(ours, ignore_errors=True)  # of a run that was killed
        ours.mkdir()
        vars(student)["mcsmoe_is_written"] = False  # so that a pruned one is saved in our format as well
        _write(student, writer.placed(ours), ours, path.name, saving)
        try:
            return export(Folder(ours), path, **saving.plain.options, overwrite=True, progress=tell), None
        except ValueError as error:
            with completed_folder(path) as target:
                for file in ours.iterdir():
                    os.replace(file, target / file.name)
            return cast(Any, student).mcsmoe_record, error
    with completed_folder(path) as target:
        plain = plain_form(student)
        writer = writer.placed(target) if plain is None else writer.converted(target, as_stored(plain))
        _write(student, writer, target, path.name, saving, path)
    return cast(Any, student).mcsmoe_record, None


def _write(
    student: PreTrainedModel, writer: ShardWriter, folder: Path, name: str, saving: Saving, target: Path | None = None
) -> None:
    """Write all but the shards that lie in a folder, which will be moved to `target`."""
    cast(Any, student)._save_into(target or folder, folder, name, state_dict={}, tokenizer=saving.tokenizer)
    writer.close()


def _result_bytes(layers: Layers, config: MergeConfig, search: SizeConfig | None) -> int:
    """Return about how many bytes of weights are written, before they are stored in few bits.

    Of a size two results lie side by side until one of them is taken.
    """
    if search:
        return 2 * check_size(layers, config, search)
    return (layers.model.num_parameters() - saved_parameters(layers, config)) * layers.model.dtype.itemsize
