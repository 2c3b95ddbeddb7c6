"""The command line: `hf-mcsmoe inspect`, `compress` and `demo`."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_mcsmoe.accounting import Account, account, bytes_on_disk, cost_rows
from hf_mcsmoe.adapters import MoELayer, moe_layers
from hf_mcsmoe.calibration import collect_statistics, uncompressed_layers
from hf_mcsmoe.compress import merge_experts, refine
from hf_mcsmoe.config import LoSparseConfig, MergeConfig, option_help
from hf_mcsmoe.data import calibration_batches, read_samples
from hf_mcsmoe.decompose import check_low_rank
from hf_mcsmoe.grouping import budget_total
from hf_mcsmoe.layer_repair import REPAIR, RepairConfig
from hf_mcsmoe.loading import check_output, empty_model, load_model, load_tokenizer
from hf_mcsmoe.model_card import describe_costs
from hf_mcsmoe.plan import MergePlan, check_request, plan_merge, selected_layers, tied_layers
from hf_mcsmoe.statistics import RoutingStatistics

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
Model = Annotated[str, typer.Argument(help="folder or Hub id of the model", metavar="MODEL")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="write into a folder that is not empty")]


@app.callback()
def _options_of_all(
    debug: Annotated[bool, typer.Option("--debug", help="show where an error arose; goes with every command")] = False,
) -> None:
    """Merge the experts of Mixture-of-Experts models (M-SMoE) into checkpoints that load anywhere."""


def _option(name: str, *declarations: str) -> Any:
    return typer.Option(*declarations, help=option_help(name))


def parse_experts(text: str) -> int | float:
    """Return the number of experts: "8" is a count per layer, "0.5" a share.

    Raises:
        ValueError: neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"--experts {text!r} is neither a whole number (8) nor a share (0.5).") from None


@app.command()
def inspect(
    model: Model,
    experts: Annotated[str, _option("experts")] = "0.5",
    skip: Annotated[list[str] | None, _option("skip")] = None,
) -> None:
    """Show a model's layers of experts and what merging them would save. Loads no weights."""
    config = MergeConfig(experts=parse_experts(experts), skip=tuple(skip or ()))
    empty = empty_model(model)
    layers = moe_layers(empty)
    kind = getattr(empty.config, "base_model_type", None) or empty.config.model_type
    console.print(f"[bold]{type(empty).__name__}[/], family {kind}" + (", merged" if _is_merged(layers) else ""))
    console.print(_layer_table(layers))
    total, held = empty.num_parameters(), sum(tied[0].num_parameters for tied in tied_layers(layers))
    console.print(f"parameters {total:,}, of them in experts {held:,} ({held / total:.1%})")
    if _is_merged(layers):
        return
    check_request(layers, config)
    after = total - _saved_parameters(layers, config)
    console.print(
        f"with --experts {experts}: parameters {after:,} ({1 - after / total:.1%} fewer), "
        f"{after * empty.dtype.itemsize / 1e9:,.2f} GB in {str(empty.dtype).removeprefix('torch.')}"
    )


@app.command()
def compress(
    model: Model,
    data: Annotated[str, typer.Option(help="calibration text: a file (txt, json, jsonl, csv, parquet) or a data set")],
    output: Annotated[Path, typer.Option(help="folder to write the merged model to")],
    experts: Annotated[str, _option("experts")] = "0.5",
    budget: Annotated[str, _option("budget")] = "adaptive",
    min_experts: Annotated[int, _option("min_experts")] = 1,
    skip: Annotated[list[str] | None, _option("skip")] = None,
    saliency: Annotated[str, _option("saliency")] = "frequency",
    similarity: Annotated[str, _option("similarity")] = "router_logits",
    grouping: Annotated[str, _option("grouping")] = "dominant",
    alignment: Annotated[str, _option("alignment")] = "weight_matching",
    reference: Annotated[str, _option("reference")] = "dominant",
    merging: Annotated[str, _option("merging")] = "frequency",
    repair: Annotated[str, typer.Option(help="fit merged layers to the original ones: " + ", ".join(REPAIR))] = "none",
    rank: Annotated[
        int | None, typer.Option(help="store merged experts as low rank + sparse (MC-SMoE), e.g. 32")
    ] = None,
    keep: Annotated[float, typer.Option(help=option_help("keep", LoSparseConfig))] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of the samples drawn and of random methods")] = 0,
    column: Annotated[str | None, typer.Option(help="column of the data with the text")] = None,
    target_column: Annotated[str | None, typer.Option(help="column with the target, for encoder-decoders")] = None,
    split: Annotated[str, typer.Option(help="split of a data set")] = "train",
    num_samples: Annotated[int, typer.Option(help="calibration samples", min=1)] = 256,
    max_length: Annotated[int, typer.Option(help="longest sample, in tokens", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="samples per forward", min=1)] = 8,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer, if not the model's own")] = None,
    dtype: Annotated[str, typer.Option(help="dtype to load and save in: auto, float32, bfloat16 ...")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="where to load the model: cpu, cuda, auto ...")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="file of routing statistics: read if it is there, else written")
    ] = None,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[str | None, typer.Option(help="also upload, to this repository of the Hub")] = None,
) -> None:
    """Merge a model's experts, guided by its routers on calibration text, and save the smaller model."""
    config = _config(locals())
    steps: dict[str, Any] = {
        "repair": None if repair == "none" else RepairConfig(method=repair),
        "low_rank": None if rank is None else LoSparseConfig(rank=rank, keep=keep),
    }
    output = _check(model, config, output, dtype, overwrite, statistics, steps["low_rank"])
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
        sums = _statistics(loaded, batches)
        if statistics:
            sums.save(statistics)
    before, on_disk = account(loaded, batch), _bytes_on_disk(model)
    plan = plan_merge(loaded, sums, config)
    with _progress("merge", len(plan.layers)) as advance:
        merged = merge_experts(loaded, plan, consume=not steps["repair"], progress=advance.layer)
    if any(steps.values()):
        with console.status("repair and decomposition, layer by layer"):
            merged = refine(merged, loaded, batches, **steps)
    after = account(merged, batch)
    describe_costs(merged, {"before": before, "after": after})
    merged.save_pretrained(output)
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(output)
    console.print(_plan_table(plan))
    before, after = replace(before, bytes_on_disk=on_disk), replace(after, bytes_on_disk=_bytes_on_disk(output))
    console.print(cost_table({"before": before, "merged": after}))
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    if push_to_hub:
        console.print(f"uploaded: {cast(Any, merged).push_to_hub(push_to_hub)}")
        if tokenizer:
            load_tokenizer(tokenizer).push_to_hub(push_to_hub)


def _config(given: dict[str, Any]) -> MergeConfig:
    """Return the options of a merge among a command's arguments, which carry the same names."""
    options = {item.name: given[item.name] for item in fields(MergeConfig)}
    return MergeConfig(**{**options, "experts": parse_experts(given["experts"]), "skip": tuple(given["skip"] or ())})


def _check(
    model: str,
    config: MergeConfig,
    output: Path,
    dtype: str,
    overwrite: bool,
    statistics: Path | None,
    low_rank: LoSparseConfig | None,
) -> Path:
    """Check all that can be checked before weights are loaded; returns the folder to write."""
    if statistics and not (statistics.is_file() or os.access(statistics.absolute().parent, os.W_OK)):
        raise ValueError(
            f"--statistics {statistics} can be neither read nor written: its folder is missing or closed."
        )
    empty = empty_model(model)
    layers = uncompressed_layers(empty)
    chosen = check_request(layers, config)
    if low_rank:
        check_low_rank(chosen, low_rank)
    parameters = empty.num_parameters() - _saved_parameters(layers, config)
    return check_output(output, overwrite=overwrite, needed_bytes=parameters * _itemsize(dtype, empty))


def _statistics(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> RoutingStatistics:
    with _progress("statistics", len(batches)) as advance:
        return collect_statistics(model, advance(batches))


@app.command()
def demo(
    experts: Annotated[str, _option("experts")] = "0.5",
    output: Annotated[Path | None, typer.Option(help="keep the merged model in this folder")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge the small trained Switch Transformer that comes with the package, in four ways, and compare them."""
    from hf_mcsmoe.demo import compare

    if output is not None:
        output = check_output(output, overwrite=overwrite, needed_bytes=0)
    console.print(compare(parse_experts(experts), output))


class _Advance:
    """Moves one progress bar, batch by batch or layer by layer."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task(description, total=total)

    def __call__(self, items: list[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.progress.advance(self.task)

    def layer(self, name: str, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def _progress(description: str, total: int) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield _Advance(progress, description, total)


def _is_merged(layers: list[MoELayer]) -> bool:
    return any(layer.merged for layer in layers)


def _saved_parameters(layers: list[MoELayer], config: MergeConfig) -> int:
    """Return how many parameters the merge removes, up to how the layers share the experts."""
    chosen = [tied[0] for tied in tied_layers(selected_layers(layers, config))]
    sizes = [layer.num_experts for layer in chosen]
    held = sum(layer.num_parameters for layer in chosen)
    return round(held * (1 - budget_total(config.experts, sizes) / sum(sizes)))


def _itemsize(dtype: str, model: PreTrainedModel) -> int:
    if dtype == "auto":
        return model.dtype.itemsize
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"--dtype {dtype!r} is no floating-point dtype of torch (auto, float32, bfloat16, float16).")
    return found.itemsize


_NAME = Column("layer", overflow="fold")


def _layer_table(layers: list[MoELayer]) -> Table:
    table = Table(_NAME, "experts", "top-k", "d", "width", "parameters", box=None)
    for layer in layers:
        sizes = (layer.num_experts, layer.top_k or "?", layer.hidden_size, layer.intermediate_size)
        table.add_row(layer.name, *map(str, sizes), f"{layer.num_parameters:,}")
    return table


def _plan_table(plan: MergePlan) -> Table:
    table = Table(_NAME, "experts before", "after", "tokens", box=None)
    for name, layer in plan.layers.items():
        counts = (len(layer.expert_map), len(layer.dominant), plan.provenance["tokens"][name])
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _bytes_on_disk(model: str | Path) -> int | None:
    """Return the bytes of a folder's safetensors; None for a Hub id and for weights in another format."""
    return bytes_on_disk(model) if any(Path(model).glob("*.safetensors")) else None


def cost_table(accounts: Mapping[str, Account]) -> Table:
    """Return the costs of a model in its stages, a column each, for the terminal."""
    head, *rows = cost_rows(accounts)
    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    return table


def main() -> None:
    """Run the command line; an error is one sentence and exit code 1, with its traceback under `--debug`."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        app(args=arguments, prog_name="hf-mcsmoe")
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, ValueError | TypeError | OSError)
        hint = "" if expected else f" ({type(error).__name__}; --debug shows where)"
        Console(stderr=True).print(f"[red]Error:[/] {escape(text)}{hint}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
