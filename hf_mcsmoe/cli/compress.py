"""`hf-mcsmoe compress`."""

import os
import time
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.card import record_of
from hf_mcsmoe.cli.display import Stages, console, cost_table, plan_table, stage_bars
from hf_mcsmoe.cli.options import Loading, Model, Output, Selection, Storage, described, itemsize, options_of
from hf_mcsmoe.compress import check_options, chosen_repair, compress
from hf_mcsmoe.data.features import calibration_batches
from hf_mcsmoe.data.text import Sample, read_samples
from hf_mcsmoe.evaluation.costs import REPETITIONS, folder_bytes
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import check_output, empty_model, load_model, load_tokenizer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import saved_parameters
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig

MERGE = [
    "budget",
    "min_experts",
    "saliency",
    "similarity",
    "grouping",
    "weighting",
    "alignment",
    "reference",
    "merging",
]


@dataclass(frozen=True)
class Calibration:
    """The text that a model is compressed on."""

    data: str = described(MISSING, "calibration text: a file (txt, json, jsonl, csv, parquet) or a data set")
    column: str | None = described(None, "column of the data with the text")
    target_column: str | None = described(None, "column with the target, for encoder-decoders")
    split: str = described("train", "split of a data set")
    num_samples: int = described(256, "calibration samples", min=1)
    max_length: int = described(512, "longest sample, in tokens", min=2)
    batch_size: int = described(8, "samples per forward", min=1)
    seed: int = described(0, "seed of the samples drawn and of random methods")

    def read(self) -> list[Sample]:
        """Return the samples.

        Raises:
            ValueError: there is no such data, or no such column.
        """
        return read_samples(self.data, column=self.column, target_column=self.target_column, split=self.split)

    def batches(
        self, samples: list[Sample], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> list[dict[str, torch.Tensor]]:
        """Return some of the samples as batches for `model(**batch)`."""
        lengths: dict[str, Any] = {
            "num_samples": self.num_samples,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
        }
        return calibration_batches(samples, tokenizer, model, **lengths, seed=self.seed)


@options_of(Calibration, "calibration")
@options_of(Output, "target")
@options_of(Selection, "selection")
@options_of(MergeConfig, "merge", MERGE)
@options_of(Storage, "storage")
@options_of(Loading, "loading")
def compress_command(
    model: Model,
    calibration: Calibration,
    target: Output,
    selection: Selection,
    merge: MergeConfig,
    storage: Storage,
    loading: Loading,
    repair: Annotated[str, typer.Option(help="fit merged layers to the original ones: " + ", ".join(REPAIR))] = "none",
    statistics: Annotated[
        Path | None, typer.Option(help="file of routing statistics: read if it is there, else written")
    ] = None,
) -> None:
    """Merge a model's experts, guided by its routers on calibration text, and save the smaller model."""
    config = replace(selection.apply(merge), seed=calibration.seed)
    stages: dict[str, Any] = {
        "repair": chosen_repair(RepairConfig(method=repair)),
        "low_rank": storage.low_rank(),
    }
    output = _check(model, config, stages, target, loading.dtype, statistics)
    tokenizer = load_tokenizer(loading.tokenizer or model)
    reads = statistics is None or not statistics.exists() or any(stages.values())
    samples = calibration.read() if reads else []
    started = time.perf_counter()
    loaded = load_model(model, dtype=loading.dtype, device_map=loading.device_map)
    batches = calibration.batches(samples, tokenizer, loaded) if reads else []
    with stage_bars() as progress:
        sums = _statistics(statistics, loaded, batches, config, progress) if statistics else None
        shown: dict[str, Any] = {"progress": progress, "repetitions": REPETITIONS}
        merged = compress(loaded, batches, config, **stages, consume=not stages["repair"], statistics=sums, **shown)
    merged.save_pretrained(output)
    record = record_of(merged)
    *_, last = record.costs
    costs = record.costs | {last: replace(record.costs[last], bytes_on_disk=folder_bytes(output))}
    if loading.tokenizer:
        tokenizer.save_pretrained(output)
    console.print(plan_table(record.plan))
    console.print(cost_table(costs))
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    target.push(merged, tokenizer if loading.tokenizer else None)


def _check(
    model: str, config: MergeConfig, stages: dict[str, Any], target: Output, dtype: str, statistics: Path | None
) -> Path:
    """Check all that can be checked before weights are loaded; returns the folder to write."""
    if statistics and not (statistics.is_file() or os.access(statistics.absolute().parent, os.W_OK)):
        raise ValueError(
            f"--statistics {statistics} can be neither read nor written: its folder is missing or closed."
        )
    empty = empty_model(model)
    layers = Layers.of(empty).uncompressed()
    check_options(layers, config, **stages)
    parameters = empty.num_parameters() - saved_parameters(layers, config)
    needed = parameters * itemsize(dtype, empty)
    return check_output(target.output, overwrite=target.overwrite, needed_bytes=needed)


def _statistics(
    file: Path, model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], config: MergeConfig, progress: Stages
) -> RoutingStatistics:
    """Return what a file holds; where there is none, collect statistics and write it."""
    if file.exists():
        console.print(f"statistics read from {escape(str(file))}" + ("" if batches else "; --data is not used"))
        return RoutingStatistics.load(file)
    sums = collect_statistics(model, progress.over("statistics", batches), config.needs)
    sums.save(file)
    return sums
