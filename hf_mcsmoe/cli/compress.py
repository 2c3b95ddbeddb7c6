"""`hf-mcsmoe compress`."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.markup import escape
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.display import console, cost_table, plan_table, progress_bar
from hf_mcsmoe.cli.options import (
    DeviceMap,
    Experts,
    Model,
    Overwrite,
    Skip,
    Tokenizer,
    itemsize,
    options_of,
    parse_experts,
)
from hf_mcsmoe.data.features import calibration_batches
from hf_mcsmoe.data.text import read_samples
from hf_mcsmoe.evaluation.costs import REPETITIONS, account, folder_bytes
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import check_output, empty_model, load_model, load_tokenizer
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.merge import merge_experts
from hf_mcsmoe.methods.budget import budget_total
from hf_mcsmoe.methods.config import MergeConfig, option_help
from hf_mcsmoe.plan import check_request, plan_merge
from hf_mcsmoe.refinement import check_refinement, refine_and_account
from hf_mcsmoe.repair.methods import REPAIR, RepairConfig

KEEP = 0.1
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


@options_of(MergeConfig, "merge", MERGE)
def compress_command(
    model: Model,
    data: Annotated[str, typer.Option(help="calibration text: a file (txt, json, jsonl, csv, parquet) or a data set")],
    output: Annotated[Path, typer.Option(help="folder to write the merged model to")],
    experts: Experts = "0.5",
    skip: Skip = None,
    *,
    merge: MergeConfig,
    repair: Annotated[str, typer.Option(help="fit merged layers to the original ones: " + ", ".join(REPAIR))] = "none",
    rank: Annotated[
        int | None, typer.Option(help="store merged experts as low rank + sparse (MC-SMoE), e.g. 32")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help=option_help("keep", LoSparseConfig) + f", {KEEP} unless given otherwise")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the samples drawn and of random methods")] = 0,
    column: Annotated[str | None, typer.Option(help="column of the data with the text")] = None,
    target_column: Annotated[str | None, typer.Option(help="column with the target, for encoder-decoders")] = None,
    split: Annotated[str, typer.Option(help="split of a data set")] = "train",
    num_samples: Annotated[int, typer.Option(help="calibration samples", min=1)] = 256,
    max_length: Annotated[int, typer.Option(help="longest sample, in tokens", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="samples per forward", min=1)] = 8,
    tokenizer: Tokenizer = None,
    dtype: Annotated[str, typer.Option(help="dtype to load and save in: auto, float32, bfloat16 ...")] = "auto",
    device_map: DeviceMap = None,
    statistics: Annotated[
        Path | None, typer.Option(help="file of routing statistics: read if it is there, else written")
    ] = None,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[str | None, typer.Option(help="also upload, to this repository of the Hub")] = None,
) -> None:
    """Merge a model's experts, guided by its routers on calibration text, and save the smaller model."""
    config = replace(merge, experts=parse_experts(experts), skip=tuple(skip or ()), seed=seed)
    steps: dict[str, Any] = {
        "repair": None if repair == "none" else RepairConfig(method=repair),
        "low_rank": _low_rank(rank, keep),
    }
    output = _check(model, config, output, dtype, overwrite, statistics, steps)
    source_tokenizer, reuse = load_tokenizer(tokenizer or model), statistics is not None and statistics.exists()
    reads = not reuse or any(steps.values())
    samples = read_samples(data, column=column, target_column=target_column, split=split) if reads else []
    started = time.perf_counter()
    loaded = load_model(model, dtype=dtype, device_map=device_map)
    sampling: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length, "batch_size": batch_size}
    batches = calibration_batches(samples, source_tokenizer, loaded, **sampling, seed=seed) if reads else []
    batch = batches[len(batches) // 2] if batches else None  # of middling length
    if statistics and reuse:
        console.print(f"statistics read from {escape(str(statistics))}" + ("" if reads else "; --data is not used"))
        sums = RoutingStatistics.load(statistics)
    else:
        sums = _statistics(loaded, batches, config)
        if statistics:
            sums.save(statistics)
    measure = partial(account, batch=batch, repetitions=REPETITIONS if batch else 0)
    before = replace(measure(loaded), bytes_on_disk=folder_bytes(model))
    plan = plan_merge(loaded, sums, config)
    with progress_bar("merge", len(plan.layers)) as advance:
        merged = merge_experts(loaded, plan, statistics=sums, consume=not steps["repair"], progress=advance.layer)
    with console.status("repair, decomposition and costs") if any(steps.values()) else nullcontext():
        accounts = refine_and_account(merged, loaded, batches, before, measure, **steps)
    merged.save_pretrained(output)
    last = list(accounts)[-1]
    accounts[last] = replace(accounts[last], bytes_on_disk=folder_bytes(output))
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(output)
    console.print(plan_table(plan))
    console.print(cost_table(accounts))
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    if push_to_hub:
        console.print(f"uploaded: {cast(Any, merged).push_to_hub(push_to_hub)}")
        if tokenizer:
            load_tokenizer(tokenizer).push_to_hub(push_to_hub)


def _low_rank(rank: int | None, keep: float | None) -> LoSparseConfig | None:
    if rank is None and keep is not None:
        raise ValueError(f"--keep {keep} is a share of S, which only --rank stores: give --rank as well.")
    return None if rank is None else LoSparseConfig(rank=rank, keep=KEEP if keep is None else keep)


def _check(
    model: str,
    config: MergeConfig,
    output: Path,
    dtype: str,
    overwrite: bool,
    statistics: Path | None,
    steps: dict[str, Any],
) -> Path:
    """Check all that can be checked before weights are loaded; returns the folder to write."""
    if statistics and not (statistics.is_file() or os.access(statistics.absolute().parent, os.W_OK)):
        raise ValueError(
            f"--statistics {statistics} can be neither read nor written: its folder is missing or closed."
        )
    empty = empty_model(model)
    layers = Layers.of(empty).uncompressed()
    check_refinement(check_request(layers, config), config, **steps)
    parameters = empty.num_parameters() - saved_parameters(layers, config)
    return check_output(output, overwrite=overwrite, needed_bytes=parameters * itemsize(dtype, empty))


def _statistics(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], config: MergeConfig
) -> RoutingStatistics:
    with progress_bar("statistics", len(batches)) as advance:
        return collect_statistics(model, advance(batches), config.needs)


def saved_parameters(layers: Layers, config: MergeConfig) -> int:
    """Return how many parameters the merge removes, up to how the layers share the experts."""
    chosen = [tied[0] for tied in layers.selected(config.skip).tied]
    sizes = [layer.num_experts for layer in chosen]
    held = sum(layer.num_parameters for layer in chosen)
    return round(held * (1 - budget_total(config.experts, sizes) / sum(sizes)))
