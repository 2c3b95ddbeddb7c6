"""Which way a compression goes here, as `plan` tells it and `compress` takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.data.features import HELD_OUT
from hf_mcsmoe.forecast.machine import resident
from hf_mcsmoe.forecast.memory import free_memory
from hf_mcsmoe.forecast.needs import BASE, IN_MEMORY, Needs, Run, needs_of
from hf_mcsmoe.forecast.result import Result, result_by_hand
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.forecast.way import Way, way_for
from hf_mcsmoe.layers.dequantize import quantization_method
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.loading import load_config
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import gradient_names
from hf_mcsmoe.options import all_needs
from hf_mcsmoe.search.budget import OTHERS, Budgeting
from hf_mcsmoe.search.choices import ranks
from hf_mcsmoe.search.compress import check_size
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.probe import TOKENS
from hf_mcsmoe.search.size import parse_size
from hf_mcsmoe.sparsity.sparsify import narrowed
from hf_mcsmoe.streamed.chain import may_be_cut
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.trials import copies_bytes


@dataclass(frozen=True)
class Judgement:
    """What a run takes by each way that it can go, which of them fits here, and why it cannot be streamed, if so."""

    needs: Mapping[str, Needs]
    way: Way
    memory: int
    refused: str | None = None


def run_for(
    layers: Layers, result: Result, config: MergeConfig, repair: str, calibration: Calibration, *, is_compared: bool
) -> Run:
    """Return the run that ends with `result`; where it is compared with the original to the end, that stays."""
    return run_of(
        layers,
        result,
        config,
        repair=repair,
        stores=is_compared,
        rows=calibration.num_samples,
        judged=calibration.num_samples // HELD_OUT,
        length=calibration.max_length,
        batch_size=calibration.batch_size,
    )


def run_by(
    layers: Layers,
    config: MergeConfig,
    stages: Mapping[str, Any],
    calibration: Calibration,
    held: RoutingStatistics | None = None,
) -> Run:
    """Return the run of a compression, from its stages; one to a size is of half of the experts in so many bytes."""
    quantization, low_rank, repair, size = (stages[x] for x in ("quantization", "low_rank", "repair", "size"))
    config, sparsity = replace(config, experts=0.5) if size else config, stages["sparsity"]
    result = result_by_hand(narrowed(layers, sparsity), config, quantization=quantization, low_rank=low_rank)
    result = replace(result, bytes=check_size(layers, config, size)) if size else result
    method = repair.method if repair else "none"
    run = run_for(layers, result, config, method, calibration, is_compared=bool(size or quantization))
    return swept(replace(run, sparse=sparsity is not None), layers, config, stages, held)


def measuring_run(layers: Layers, config: MergeConfig, search: SizeConfig, calibration: Calibration) -> Run:
    """Return the run that measures what choices cost, and makes nothing of it: each layer is fitted by itself."""
    nothing, stages = Result({}, 0, 0, 0), {"size": search, "low_rank": None}
    run = run_for(layers, nothing, config, "joint", calibration, is_compared=True)
    run = replace(run, merged=0, aligned=False, consume=True)
    run = swept(run, layers, config, stages, None)
    return replace(run, tried=1, sweeps=2 + run.gradients)


def swept(
    run: Run, layers: Layers, config: MergeConfig, stages: Mapping[str, Any], held: RoutingStatistics | None
) -> Run:
    """Return a run with the sweeps that it takes block by block, and with what is tried on the way.

    Args:
        stages: what is asked for beside the merge, by the names of `Asked`.
        held: what is known before; None where the first sweep sums it.
    """
    size, low_rank = stages["size"], stages["low_rank"]
    search, plans = size, 0
    if size is None and config.budget == MEASURED:
        search = Budgeting.of(layers, config, None).search
        plans = 1 + len(OTHERS) * len(search.reductions)
    measures = search is not None and not (held and held.curves)
    competes = low_rank is not None and low_rank.scope == "global"
    goes_back = held is None and bool(gradient_names(all_needs(config, size, stages.get("quantization"))))
    tokens = min(TOKENS, (run.rows - run.judged) * run.length)
    run = _trying(run, layers, search) if search and measures else run
    return replace(
        run,
        sweeps=1 + (held is None) + goes_back + measures + (plans > 0) + competes,
        tried=2 if size else 1,
        plans=plans,
        cut=may_be_cut(config),
        gradients=goes_back,
        copies=copies_bytes(layers, tokens, config, search) if search and measures else 0,
    )


def _trying(run: Run, layers: Layers, search: SizeConfig) -> Run:
    """Return a run with the ways to fewer experts, numbers of bits and ranks that are tried in each layer."""
    number = len(ranks(layers.tied[0], search))
    return replace(run, reductions=len(search.reductions), bits=len(search.bits), ranks=number)


def judged(
    layers: Layers,
    run: Run,
    source: int,
    stream: StreamConfig,
    *,
    refused: str | None = None,
    disk: int | None = None,
) -> Judgement:
    """Return which way a run goes on this machine.

    Args:
        source: bytes of the weight files.
        stream: how it would be read block by block; hidden states that do not fit then lie on disk alone.
        refused: why it cannot be; None where it can.
        disk: bytes that are free where the result goes; None where somebody else looks after them.
    """
    model, held = layers.model, resident()
    is_quantized = quantization_method(load_config(str(model.name_or_path))) is not None
    sizes, small = sizes_of(layers, is_quantized=is_quantized), None
    try:
        waiting = max(run.waiting, run.waiting_back(sizes.block_count))
        is_mapped = waiting * sizes.hidden_size * sizes.itemsize > stream.room(model)
    except ValueError as error:
        is_mapped, small = True, str(error)
    needs = needs_of(sizes, replace(run, hidden_limit=0 if is_mapped else None), source, base=held or BASE)
    alone, memory = {IN_MEMORY: needs[IN_MEMORY]}, free_memory() + (held or 0)
    way = way_for(alone if refused or small else needs, memory, disk)
    return Judgement(alone if refused else needs, way, memory, refused or small)


def refusal(layers: Layers) -> str | None:
    """Return why a compression cannot be done block by block; None where it can."""
    try:
        check_blocks(layers)
    except ValueError as error:
        return str(error)
    return None


def way_line(way: Way) -> str:
    """Return the sentence that tells the way of a model."""
    return f"here: {way.name} ({way.reason})"


def stream_config(memory: str | None, *, restart: bool = False) -> StreamConfig:
    """Return how to stream with what `--memory` says.

    Raises:
        ValueError: a memory that is none.
    """
    try:
        size = None if memory is None else parse_size(memory)
    except ValueError:
        size = 0.0
    if isinstance(size, float):
        raise ValueError(f"--memory {memory} is no amount of memory: give bytes, as 8GB or 800MB.")
    return StreamConfig(size, restart)
