"""The sums of each finished block of a first sweep, in a file of its own beside the journal."""

from collections.abc import Sequence

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.streamed.journal import Journal


def known_sums(layers: Layers, journal: Journal, number: int) -> RoutingStatistics:
    """Return the sums of so many finished blocks, and for all other layers none."""
    found = RoutingStatistics(layers.fingerprint)
    for place in range(number):
        found.layers |= RoutingStatistics.load(_file(journal, place)).layers
    found.layers = {layer.name: found.layers.get(layer.name, Sums()) for layer in layers}
    return found


def save_sums(found: RoutingStatistics, here: Sequence[MoELayer], journal: Journal, number: int) -> None:
    """Save the sums of the layers of a block that is finished, after so many others."""
    own = RoutingStatistics(found.fingerprint, {layer.name: found[layer.name] for layer in here})
    own.save(_file(journal, number))


def _file(journal: Journal, number: int) -> str:
    return str(journal.folder / f"sums-{number:05d}.safetensors")
