"""What is summed over the tokens of calibration data: named functions of what one forward shows of a layer.

A statistic returns a tensor whose shape depends on the layer alone. The answers of all batches, shards and processes
are added, so sum in float64 (or count in int64) and divide later.
"""

from collections.abc import Iterable

import torch

from hf_mcsmoe.methods.registry import Registry, unknown
from hf_mcsmoe.methods.routed import Routed

STATISTICS = Registry("statistic")


@STATISTICS.register("counts", axes="E")
def counts(routed: Routed) -> torch.Tensor:
    """Return the tokens that reached each expert, int64 [E]."""
    return torch.bincount(routed.index[routed.reached], minlength=routed.num_experts)


@STATISTICS.register("gate_sum", axes="E")
def gate_sum(routed: Routed) -> torch.Tensor:
    """Return the sum of the weights that each expert received, float64 [E]."""
    picks, gates = routed.index[routed.reached], routed.gates[routed.reached].double()
    return torch.zeros(routed.num_experts, dtype=torch.float64, device=picks.device).index_add_(0, picks, gates)


@STATISTICS.register("logit_gram", axes="EE", signed=True)
def logit_gram(routed: Routed) -> torch.Tensor:
    """Return the sum over tokens of `h h^T` for router logits `h` [E], float64 [E, E]."""
    logits = routed.logits.double()
    return logits.mT @ logits


@STATISTICS.register("tokens", axes="")
def tokens(routed: Routed) -> torch.Tensor:
    """Return the number of tokens, int64 []."""
    return torch.tensor(len(routed.logits))


def of_data(needs: Iterable[str]) -> list[str]:
    """Return the names of statistics that tokens tell, of some.

    Raises:
        ValueError: a name that no statistic has.
    """
    return [name for name in needs if STATISTICS.find(name).from_data]


def gradient_names(needs: Iterable[str]) -> list[str]:
    """Return the names of statistics that are taken after a backward pass, of some.

    Raises:
        ValueError: a name that no statistic has.
    """
    return [name for name in needs if STATISTICS.find(name).gradients]


def with_tokens(needs: Iterable[str]) -> list[str]:
    """Return the names of statistics once each, and "tokens", which every plan reads, among them.

    Raises:
        ValueError: a name that no statistic has.
    """
    names = list(dict.fromkeys([*needs, "tokens"]))
    for name in names:
        if name not in STATISTICS.methods:
            raise ValueError(unknown("statistic", name, list(STATISTICS)))
    return names
