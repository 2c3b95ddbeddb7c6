"""`--scores`: a file of statistics that a command reads in place of a pass."""

from collections.abc import Iterable
from pathlib import Path

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers


def read_scores(file: Path, layers: Layers, needs: Iterable[str] = ()) -> RoutingStatistics:
    """Return the statistics that a file holds, checked without weights.

    Raises:
        ValueError: there is no such file, it is damaged or of other layers, or it lacks a sum.
    """
    if not file.is_file():
        raise ValueError(f"--scores {file} is no file: write it with `hf-mcsmoe calibrate MODEL --data ...`.")
    statistics = RoutingStatistics.load(file)
    if statistics.layers.keys() != set(layers.names):
        raise ValueError(
            f"--scores {file} was taken from another model: it holds the layers {', '.join(statistics.layers)}, "
            f"and this one has {', '.join(layers.names)}."
        )
    needed = list(needs)
    for sums in statistics.layers.values():
        sums.check(needed)
    statistics.check({layer.name: layer.sizes for layer in layers})
    return statistics
