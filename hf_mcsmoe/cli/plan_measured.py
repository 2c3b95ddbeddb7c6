"""What `hf-mcsmoe plan` knows of what choices cost: from a file of statistics, or measured on text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.options import Loading, check_file, described
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import opened, tell_streamed
from hf_mcsmoe.cli.way import judged
from hf_mcsmoe.forecast.needs import IN_MEMORY, Run
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.curves import add_curves


@dataclass(frozen=True)
class Planning(Calibration):
    """The text that choices are measured on; without any, only sizes are told."""

    data: list[str] | None = described(  # type: ignore[assignment]
        None, "calibration text that choices are measured on; without it and --scores only sizes are told"
    )

    def __post_init__(self) -> None:
        """Take no data as none; see `Calibration`."""
        object.__setattr__(self, "data", list(self.data or []))
        super().__post_init__()


@dataclass(frozen=True)
class Measuring:
    """How a model is read for what choices cost."""

    stream: bool | None = described(
        None,
        "measure on --data block by block, one of them in memory",
        show_default="where the model does not fit into memory",
    )
    drop_source_cache: bool = described(
        False, "with --stream: remove shards of a Hub id from the cache again, once they are read"
    )

    def __post_init__(self) -> None:
        """Refuse what says how to stream where nothing is.

        Raises:
            ValueError: as said.
        """
        if self.drop_source_cache and not self.stream:
            raise ValueError("--drop-source-cache goes with --stream, which reads a shard at a time: give both.")

    @property
    def config(self) -> StreamConfig:
        """How to stream: anew, for nothing is kept."""
        return StreamConfig(None, True, self.drop_source_cache)

    def check(self, model: str, layers: Layers, *, has_text: bool) -> None:
        """Raise ValueError, before any work, where it is asked for and cannot be done, or has nothing to say."""
        if self.stream and not has_text:
            raise ValueError("--stream says how choices are measured on --data: give that as well, or leave it out.")
        self.config.check_drops(model)
        if self.stream:
            check_blocks(layers)

    def is_chosen(self, layers: Layers, run: Run, source: int) -> bool:
        """Tell whether to measure block by block, and note it where nobody asked.

        Args:
            run: see `measuring_run`.
            source: bytes of the weight files.

        Raises:
            ValueError: the model does not fit, and cannot be measured so.
        """
        if self.stream is not None:
            return self.stream
        found = judged(layers, run, source, self.config)
        if found.way.name == IN_MEMORY:
            return False
        check_blocks(layers)
        tell_streamed(found)
        return True


def read_curves(file: Path, layers: Layers) -> RoutingStatistics | None:
    """Return statistics, with curves if there are any; None where there is no file yet.

    Raises:
        ValueError: it is damaged, or of another model.
    """
    if not file.is_file():
        check_file(file, "--scores")
        return None
    statistics = RoutingStatistics.load(file)
    statistics.check({layer.name: layer.sizes for layer in layers})
    if statistics.layers.keys() != set(layers.names):
        raise ValueError(f"--scores {file} was taken from another model, of other layers.")
    return statistics


def measured(
    model: str,
    calibration: Planning,
    loading: Loading,
    stream: StreamConfig | None,
    config: MergeConfig,
    search: SizeConfig,
    progress: Progress,
) -> tuple[Layers, RoutingStatistics]:
    """Read the model, and measure what choices cost on the calibration text.

    Args:
        stream: how it is read block by block; None to load it.
    """
    tokenizer = load_tokenizer(loading.tokenizer or model)
    samples = calibration.read(progress)
    how: dict[str, Any] = {"dtype": loading.dtype, "device_map": loading.device_map, "dequantize": loading.dequantize}
    with one_step("loading", progress):
        folder = None if stream is None else opened(model, loading, stream, Path.cwd())
        layers = Layers.of(folder or load_model(model, **how))
    # What is held out judges a later `compress`.
    rows, _ = calibration.batches(samples, tokenizer, layers.model, progress)
    statistics = collect_statistics(
        layers, counted(rows, "statistics", progress), needs_of(config, search), place=Path.cwd()
    )
    add_curves(layers, rows, statistics, config, search, progress, Path.cwd())
    if folder:
        folder.drop_fetched()
    return layers, statistics
