"""What `hf-mcsmoe plan` knows of what choices cost: from a file of statistics, or measured on text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.options import Loading, check_file, described
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.progress import Progress, counted, one_step
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of
from hf_mcsmoe.streamed.curves import curves_of_folder


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
    model: str, calibration: Planning, loading: Loading, config: MergeConfig, search: SizeConfig, progress: Progress
) -> tuple[Layers, RoutingStatistics]:
    """Load the model, and measure what choices cost on the calibration text."""
    tokenizer = load_tokenizer(loading.tokenizer or model)
    samples = calibration.read(progress)
    with one_step("loading", progress):
        loaded = load_model(model, dtype=loading.dtype, device_map=loading.device_map, dequantize=loading.dequantize)
    rows, _ = calibration.batches(samples, tokenizer, loaded, progress)  # what is held out judges a later `compress`
    layers = Layers.of(loaded)
    statistics = collect_statistics(layers, counted(rows, "statistics", progress), needs_of(config, search))
    add_curves(layers, rows, statistics, config, search, progress, Path.cwd())
    return layers, statistics


def add_curves(
    layers: Layers,
    batches: Sequence[Batch],
    statistics: RoutingStatistics,
    config: MergeConfig,
    search: SizeConfig,
    progress: Progress,
    place: Path,
) -> None:
    """Measure what choices cost, of a `Folder` block by block, and keep it with the statistics.

    Args:
        place: a folder on the disk of which hidden states may lie meanwhile.
    """

    def tell(name: str, done: int, total: int) -> None:
        progress("curves", done, total)

    given = layers, statistics, batches, config, search
    if isinstance(layers.source, Folder):
        statistics.curves = curves_of_folder(*given, repair=JOINT, progress=tell, place=place)
    else:
        statistics.curves = measure_curves(*given, progress=tell)
    statistics.conditions = conditions(config, search, JOINT)
