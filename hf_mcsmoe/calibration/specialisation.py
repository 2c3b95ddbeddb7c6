"""How specialised the experts of a model are, on text with labels or without."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.specialisation import NEEDS, Specialisation, specialisation
from hf_mcsmoe.progress import Progress, counted, part_of, silent


def measure_specialisation(
    layers: Layers, labelled: Mapping[str, Sequence[Batch]], progress: Progress = silent
) -> dict[str, Specialisation]:
    """Return the measures of each layer by its name, from one forward of each batch.

    Args:
        labelled: the batches of each label, e.g. of each data set; of a single one nothing is told of labels.
        progress: called as `progress("statistics", batches done, batches)`.

    Raises:
        ValueError: see `collect_statistics`; or no batches at all.
    """
    total, done, found = sum(map(len, labelled.values())), 0, []
    for batches in labelled.values():
        tell = part_of(progress, done, total)
        found.append(collect_statistics(layers, counted(batches, "statistics", tell), NEEDS))
        done += len(batches)
    if not found:
        raise ValueError("There is no text to measure on: give batches of at least one label.")
    together = reduce(add, found)
    return {
        name: specialisation(sums, [part[name].counts for part in found]) for name, sums in together.layers.items()
    }
