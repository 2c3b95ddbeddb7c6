"""Some tokens of a layer, for methods that compare what experts make of the same tokens.

Which tokens stay follows from what they hold, not from when they came: samples of shards of the data add up to the
sample of all of it. Tokens that are equal in everything stay once.
"""

from collections.abc import Callable

import torch

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS

SAMPLE = "sample"
# The most tokens that are kept of a layer.
TOKENS = 1024
# Columns of a row that say how wide the others are: K and D.
HEAD = 2


def _mixed(keys: torch.Tensor) -> torch.Tensor:
    """Return int64 keys scattered over all 64 bits (the finaliser of SplitMix64, on signed numbers that wrap)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def _keys(rows: torch.Tensor) -> torch.Tensor:
    """Return a number per row of float32 [n, m], int64 [n], that follows from all bits of the row."""
    bits = (rows + 0.0).view(torch.int32).long()  # -0 becomes 0
    places = _mixed(torch.arange(1, rows.shape[1] + 1, device=rows.device))
    return _mixed(_mixed(bits + places).sum(1))


def lowest(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return of the rows of two samples those of the lowest keys, each once: what the sample of all tokens is."""
    rows = torch.cat([one, other])
    keys, order = _keys(rows).sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return rows[order[first][:TOKENS]]


@STATISTICS.register(SAMPLE, combine=lowest)
def sample(routed: Routed) -> torch.Tensor:
    """Return up to 1,024 tokens, float32 [n, 2 + D + W + 3 K]: K, D, hidden, logits, picks, weights, scale.

    W is the width of the router's logits. Picks are whole numbers below 2^24, which float32 holds exactly.
    """
    tokens, top_k = routed.index.shape
    scale = torch.ones_like(routed.weights) if routed.scale is None else routed.scale
    head = torch.tensor([top_k, routed.hidden.shape[1]], device=routed.hidden.device).expand(tokens, HEAD)
    parts = (head, routed.hidden, routed.logits, routed.index, routed.weights, scale)
    table = torch.cat([part.to(routed.hidden.device, torch.float32) for part in parts], 1)
    return lowest(table[:0], table)


def sampled(table: torch.Tensor, num_experts: int, open_experts: Callable[[], Experts]) -> Routed:
    """Return the tokens of a sample, on the device of the experts.

    Args:
        table: what `sample` gave.

    Raises:
        ValueError: it holds no token, or is no such table.
    """
    if not len(table):
        raise ValueError("The sample holds no token, because none of the calibration data counted: calibrate anew.")
    top_k, width = (int(number) for number in table[0, :HEAD])
    rest = table.shape[1] - HEAD - width - 3 * top_k
    if min(top_k, width) < 1 or rest < 1:
        raise ValueError(f"The sample of shape {tuple(table.shape)} is damaged: calibrate anew.")
    rows = table[:, HEAD:].to(open_experts().tensors["down"][0].device)
    hidden, logits, index, weights, scale = rows.split([width, rest, top_k, top_k, top_k], 1)
    scaled = None if (scale == 1).all() else scale
    return Routed(logits, hidden, index.long(), weights, num_experts, open_experts, scaled)
