"""What needs all of a model at once, and is refused where it is read block by block."""

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.statistics import STATISTICS, of_data
from hf_mcsmoe.options import all_needs
from hf_mcsmoe.streamed.chain import Asked


def check_streamed(layers: Layers, config: MergeConfig, asked: Asked, statistics: RoutingStatistics | None) -> None:
    """Check, without weights, that a compression can be done block by block.

    Raises:
        ValueError: it cannot; the message says what needs all of the model.
    """
    check_blocks(layers)
    late = [
        name for name in of_data(all_needs(config, asked.size, asked.quantization)) if STATISTICS.find(name).gradients
    ]
    if late and statistics is None:
        raise ValueError(
            f"{late[0]} is summed after a backward pass, for which the model is loaded: collect it with `hf-mcsmoe "
            "calibrate` where that fits, and pass the file (--scores), or choose other methods."
        )


def check_blocks(layers: Layers) -> None:
    """Raise ValueError where experts lie in no block, or in several."""
    for shared in layers.tied:
        if len(shared) > 1:
            raise ValueError(
                f"{', '.join(layer.name for layer in shared)} share their experts, and lie in several blocks: what "
                "all of them see is never at hand together, and the later ones read a cache that the earlier ones "
                "fill, which a run that goes on would lack. Load the model (--no-stream)."
            )
    paths = tuple(f"{path}." for path in blocks(layers.model))
    if outside := [layer.name for layer in layers if not layer.name.startswith(paths)]:
        raise ValueError(f"{outside[0]} lies in no block of {type(layers.model).__name__}: load it (--no-stream).")
