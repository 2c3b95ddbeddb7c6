"""How much longer the router's rows have become since a reference checkpoint, from which the model was trained on."""

import torch

from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView

CHANGE = "router_norm_change"


def _first(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one


@STATISTICS.register(CHANGE, axes="E", signed=True, combine=_first, from_data=False)
def no_data_tell_it(routed: Routed) -> torch.Tensor:
    """Return `|w| - |w0|` of the router's rows w and those of a reference checkpoint w0, float64 [E]: not by tokens.

    `add_reference` puts it into statistics; of layers that share their experts it is the first one's.
    """
    raise ValueError(f"No tokens tell {CHANGE!r}: it compares with a reference checkpoint; see `add_reference`.")


@SALIENCY.register(CHANGE, paper="2405.16646", needs=[CHANGE])
def router_norm_change(view: LayerView) -> torch.Tensor:
    """Return how much longer each expert's row of the router has become, float64 [E]; negative where it is shorter.

    The difference of the norms to a reference checkpoint, before fine-tuning, not the norm of the difference. It
    needs no data, and is weaker than what reads them.
    """
    return view.sums[CHANGE]
