"""What `hf-mcsmoe plan` tells of a run: what options lead to, what that takes, and which way it goes here."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.dial import Dial
from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.options import Inside, Storage, described
from hf_mcsmoe.cli.plan_measured import Planning
from hf_mcsmoe.cli.plan_tables import needs_table
from hf_mcsmoe.cli.way import judged, refusal, run_for, stream_config, swept, way_line
from hf_mcsmoe.forecast.duration import seconds_of
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.machine import measure_pace
from hf_mcsmoe.forecast.needs import Needs, Run
from hf_mcsmoe.forecast.result import Result, result_by_hand, result_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.stored import Stored
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.options import check_sparse, check_unsized
from hf_mcsmoe.planning import check_request
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import REPAIR
from hf_mcsmoe.search.choices import check_reachable, choose
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.size import bytes_of, bytes_text
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import narrowed


@dataclass(frozen=True)
class Asked:
    """What is asked for: experts, what they are stored as and what inside them goes by hand, or else a size."""

    config: MergeConfig
    quantization: QuantizationConfig | None
    low_rank: LoSparseConfig | None
    sparsity: SparsityConfig | None
    search: SizeConfig | None

    @classmethod
    def of(cls, dial: Dial, merge: MergeConfig, storage: Storage, inside: Inside, seed: int) -> "Asked":
        """Return what options of the command line ask for.

        Raises:
            ValueError: options of a merge, or of what is left out inside experts, that do nothing beside a size.
        """
        config, search = replace(dial.apply(merge), seed=seed), dial.size_config(merge, storage)
        sparsity = inside.config(dial.skip or ())
        if search and sparsity:
            raise ValueError(
                f"--sparsify {inside.sparsify} goes with a number of experts, and a size chooses that: give --experts "
                "(1.0 for all of them) in place of --size."
            )
        if search:
            config = replace(config, min_experts=1)  # the size's options have it
            check_unsized(config, search)
        return cls(config, dial.quantization(), None if search else storage.low_rank(), sparsity, search)

    def check(self, layers: Layers) -> None:
        """Raise ValueError where this model cannot become what is asked for."""
        check_request(layers, replace(self.config, experts=1.0) if self.search else self.config)
        if self.sparsity:
            check_sparse(layers, self.sparsity, self.low_rank, self.quantization)
            layers = narrowed(layers, self.sparsity)
        if self.quantization:
            self.quantization.check_layers(layers.selected(self.config.skip))
        if self.low_rank:
            check_low_rank(layers, replace(self.low_rank, skip=self.config.skip))

    @property
    def stages(self) -> dict[str, Any]:
        """What is asked for beside the merge, by name."""
        stages = {"low_rank": self.low_rank, "quantization": self.quantization}
        return stages | {"sparsity": self.sparsity, "size": self.search}

    def result(self, layers: Layers, statistics: RoutingStatistics | None, source: int) -> Result | None:
        """Return the result; None for a size that nobody measured, which is shared out when text is at hand.

        Raises:
            ValueError: the size cannot be reached.
        """
        if self.search is None:
            left = narrowed(layers, self.sparsity)
            return result_by_hand(left, self.config, quantization=self.quantization, low_rank=self.low_rank)
        limit = bytes_of(self.search.size, source)
        check_reachable(layers, self.search, limit, self.config.skip)
        if statistics is None:
            return None
        chosen = choose(layers, statistics.curves, self.search, limit, self.config.skip)
        return result_of(layers, chosen.choices, self.config.skip)


@dataclass(frozen=True)
class Estimate:
    """What a run is taken to be, and what is told of it."""

    repair: str | None = described(
        None, f"how merged layers will be fitted: {', '.join(REPAIR)}", show_default="refit; with --size joint"
    )
    memory: str | None = described(
        None,
        "memory for a block and hidden states (8GB), which else lie on disk, of a run block by block",
        show_default="most of what is free",
    )
    time: bool = described(False, "measure this machine for ten seconds, and estimate how long a run takes")

    def __post_init__(self) -> None:
        """Raise ValueError where no repair has this name, or the memory is none."""
        stream_config(self.memory)
        if self.repair is not None:
            REPAIR.check(self.repair)


def told_of_run(
    model: str,
    layers: Layers,
    asked: Asked,
    result: Result | None,
    stored: Stored,
    calibration: Planning,
    estimate: Estimate,
    statistics: RoutingStatistics | None,
) -> dict[str, Any]:
    """Print what a run takes, and return it as JSON values."""
    run = _run(layers, asked, result, stored, estimate, calibration)
    run = swept(run, layers, asked.config, asked.stages, statistics)
    disk, refused = shutil.disk_usage(Path.cwd()).free, refusal(layers)
    found = judged(layers, run, stored.bytes, stream_config(estimate.memory), refused=refused, disk=disk)
    needs, way = found.needs, found.way
    seconds = _seconds(model, layers, run, needs) if estimate.time else {}
    rows = f"{run.rows} rows of {run.length} tokens, repair {run.repair}"
    console.print(f"\nwhat a run takes on the CPU ({rows}):", highlight=False, soft_wrap=True)
    console.print(needs_table(needs, seconds))
    console.print(way_line(way), highlight=False, soft_wrap=True)
    if found.refused:
        console.print(f"not block by block: {escape(found.refused)}", highlight=False, soft_wrap=True)
    if not Path(model).is_dir():
        console.print(hub_line(stored.bytes, run.sweeps), highlight=False, soft_wrap=True)
    ways = {
        name: {
            **{"memory": item.memory, "needed": item.needed, "phases": item.phases},
            **{"disk": item.disk, "read": item.read, "seconds": seconds.get(name)},
        }
        for name, item in needs.items()
    }
    return {
        "run": asdict(run),
        "needs": ways,
        "way": asdict(way),
        "not_streamed": found.refused,
        "memory_free": found.memory,
        "fetched": None if Path(model).is_dir() else {"kept": stored.bytes, "dropped": run.sweeps * stored.bytes},
    }


def hub_line(source: int, sweeps: int) -> str:
    """Return the sentence that tells what of a model of the Hub is fetched, and stays on disk beside the result."""
    return (
        f"from the Hub {bytes_text(source)} are fetched, which stay in its cache; block by block with "
        f"--drop-source-cache {bytes_text(sweeps * source)} at most, of which a few shards at a time are there"
    )


def _seconds(model: str, layers: Layers, run: Run, needs: Mapping[str, Needs]) -> dict[str, dict[str, float]]:
    """Return the seconds of each part, by way, after measuring this machine."""
    sizes = sizes_of(layers)
    folder = Path(model) if Path(model).is_dir() else None
    tokens = max(1, run.batch_size * run.length * sizes.top_k // sizes.num_experts)
    pace = measure_pace(tokens, sizes.hidden_size, sizes.intermediate_size, layers.model.dtype, folder)
    figures = figures_of(layers)
    return {name: seconds_of(sizes, figures, run, item, pace) for name, item in needs.items()}


def _run(
    layers: Layers,
    asked: Asked,
    result: Result | None,
    stored: Stored,
    estimate: Estimate,
    calibration: Planning,
) -> Run:
    """Return the run; for a size that nobody measured, of half of the experts in as many bytes as are asked for."""
    config, repair = asked.config, estimate.repair or ("joint" if asked.search else "refit")
    if result is None:
        config = replace(config, experts=0.5)
        size = asked.search.size if asked.search else 1.0
        result = replace(result_by_hand(layers, config), bytes=bytes_of(size, stored.bytes))
    fewer = any(result.choices[x.name].experts < x.num_experts for x in layers if x.name in result.choices)
    stores, is_compared = (
        bool(asked.search or asked.quantization or asked.low_rank),
        asked.search or asked.quantization,
    )
    narrows = asked.sparsity is not None and asked.sparsity.is_units
    repair = repair if fewer or stores or narrows else "none"
    run = run_for(layers, result, config, repair, calibration, is_compared=bool(is_compared))
    return replace(run, sparse=asked.sparsity is not None)
