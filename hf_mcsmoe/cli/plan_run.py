"""What `hf-mcsmoe plan` tells of a run: what options lead to, what that takes, and which way it goes here."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.dial import Dial
from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.options import Storage, described
from hf_mcsmoe.cli.plan_measured import Planning
from hf_mcsmoe.cli.plan_tables import needs_table
from hf_mcsmoe.data.features import HELD_OUT
from hf_mcsmoe.forecast.duration import seconds_of
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.machine import free_memory, measure_pace, resident
from hf_mcsmoe.forecast.needs import BASE, Needs, Run, needs_of
from hf_mcsmoe.forecast.result import Result, result_by_hand, result_of
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import Sizes, sizes_of
from hf_mcsmoe.forecast.way import way_for
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.stored import Stored
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import check_low_rank
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.plan import check_request
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import REPAIR
from hf_mcsmoe.search.choices import check_reachable, choose
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.size import bytes_of


@dataclass(frozen=True)
class Asked:
    """What is asked for: experts and what they are stored as by hand, or else a size."""

    config: MergeConfig
    quantization: QuantizationConfig | None
    low_rank: LoSparseConfig | None
    search: SizeConfig | None

    @classmethod
    def of(cls, dial: Dial, storage: Storage, seed: int) -> "Asked":
        """Return what options of the command line ask for."""
        merge = MergeConfig()
        low_rank = storage.low_rank() if dial.is_by_hand else None
        return cls(
            replace(dial.apply(merge), seed=seed), dial.quantization(), low_rank, dial.size_config(merge, storage)
        )

    def check(self, layers: Layers) -> None:
        """Raise ValueError where this model cannot become what is asked for."""
        check_request(layers, replace(self.config, experts=1.0) if self.search else self.config)
        if self.quantization:
            self.quantization.check_layers(layers.selected(self.config.skip))
        if self.low_rank:
            check_low_rank(layers, replace(self.low_rank, skip=self.config.skip))

    def result(self, layers: Layers, statistics: RoutingStatistics | None, source: int) -> Result | None:
        """Return the result; None for a size that nobody measured, which is shared out when text is at hand.

        Raises:
            ValueError: the size cannot be reached.
        """
        if self.search is None:
            return result_by_hand(layers, self.config, quantization=self.quantization, low_rank=self.low_rank)
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
    time: bool = described(False, "measure this machine for ten seconds, and estimate how long a run takes")

    def __post_init__(self) -> None:
        """Raise ValueError where no repair has this name."""
        if self.repair is not None:
            REPAIR.check(self.repair)


def told_of_run(
    model: str,
    layers: Layers,
    asked: Asked,
    result: Result | None,
    stored: Stored,
    calibration: Planning,
    estimate: "Estimate",
    *,
    is_quantized: bool,
) -> dict[str, Any]:
    """Print what a run takes, and return it as JSON values."""
    sizes = sizes_of(layers, is_quantized=is_quantized)
    run = _run(layers, asked, result, stored, estimate, calibration)
    needs = needs_of(sizes, run, stored.bytes, base=resident() or BASE)
    free, disk = free_memory() + (resident() or 0), shutil.disk_usage(Path.cwd()).free
    way = way_for(needs, free, disk)
    seconds = _seconds(model, layers, sizes, run, needs) if estimate.time else {}
    rows = f"{run.rows} rows of {run.length} tokens, repair {run.repair}"
    console.print(f"\nwhat a run takes on the CPU ({rows}):", highlight=False, soft_wrap=True)
    console.print(needs_table(needs, seconds))
    console.print(f"here: {way.name} ({way.reason})", highlight=False, soft_wrap=True)
    ways = {
        name: {
            **{"memory": item.memory, "needed": item.needed, "phases": item.phases},
            **{"disk": item.disk, "read": item.read, "seconds": seconds.get(name)},
        }
        for name, item in needs.items()
    }
    return {"run": asdict(run), "needs": ways, "way": asdict(way), "memory_free": free}


def _seconds(
    model: str, layers: Layers, sizes: Sizes, run: Run, needs: dict[str, Needs]
) -> dict[str, dict[str, float]]:
    """Return the seconds of each part, by way, after measuring this machine."""
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
    stores = bool(asked.search or asked.quantization or asked.low_rank)
    return run_of(
        layers,
        result,
        config,
        repair=repair if fewer or stores else "none",
        stores=stores,
        rows=calibration.num_samples,
        judged=calibration.num_samples // HELD_OUT,
        length=calibration.max_length,
        batch_size=calibration.batch_size,
    )
