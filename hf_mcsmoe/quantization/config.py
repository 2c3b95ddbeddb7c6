"""Options of quantized experts. Each is described once, here; the command line reads the descriptions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.methods.checks import check_fields
from hf_mcsmoe.methods.choice import BITS, Grid
from hf_mcsmoe.methods.config import option
from hf_mcsmoe.methods.options import Options
from hf_mcsmoe.quantization.codes import check_group_size, group_size_for
from hf_mcsmoe.quantization.expert_bits import IMPORTANCE
from hf_mcsmoe.quantization.nearest import ROUNDING

# Weights that share a scale where nothing else is said, and their number divides an input axis.
GROUP_SIZE = 64


@dataclass(frozen=True)
class QuantizationConfig(Options):
    """In how many bits experts are stored. The method is given by name, or as a callable of the same signature.

    Raises:
        ValueError: bits that cannot be stored, a group of no weight, an unknown name, a share outside (0, 1), or one
            of `low_bits` and `low_share` that says nothing without the other.
    """

    file_name = "mcsmoe_quantization.json"

    bits: int = option(4, "bits a weight: 8, 4, 3 or 2")
    group_size: int | None = option(
        None, "weights that share a scale; unless given 64, or the largest number below that divides an input axis"
    )
    symmetric: bool = option(True, "values around zero; without, groups have zero points")
    method: str | Callable = option("gptq", "how values are rounded", ROUNDING)
    low_bits: int | None = option(None, "bits of each layer's least important experts; all have the same without")
    low_share: float = option(0.5, "share of a layer's experts that have `low_bits`")
    importance: str | Callable = option("contribution", "which experts are important", IMPORTANCE)
    skip: tuple[str, ...] = option((), "layers to leave as they are: patterns of layer names")

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        ROUNDING.check(self.method)
        IMPORTANCE.check(self.importance)
        check_fields(self)
        for name, bits in {"bits": self.bits, "low_bits": self.low_bits}.items():
            if bits is not None and bits not in BITS:
                raise ValueError(f"{name}={bits!r} must be one of {', '.join(map(str, BITS))}.")
        if self.low_bits is not None and self.low_bits >= self.bits:
            raise ValueError(f"low_bits={self.low_bits} must be fewer than bits={self.bits}.")
        if not 0 < self.low_share < 1:
            raise ValueError(f"low_share={self.low_share!r} must be a share in (0, 1).")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r} must be a whole number of weights, from 1 on.")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that tell which experts are important, where some have fewer bits."""
        return IMPORTANCE.needs(self.importance) if self.low_bits is not None else ()

    def grid(self, width: int) -> Grid:
        """Return the grid of matrices of `width` inputs."""
        return Grid(self.bits, self.group_size or group_size_for(width, GROUP_SIZE), self.symmetric)

    def check_layers(self, layers: Sequence[MoELayer]) -> None:
        """Raise ValueError where the groups do not divide the input axes of a layer's matrices."""
        for layer in layers:
            for what, width in (("W_in", layer.hidden_size), ("W_out", layer.intermediate_size)):
                check_group_size(width, self.grid(width).group_size, f"{what} in {layer.name}")
