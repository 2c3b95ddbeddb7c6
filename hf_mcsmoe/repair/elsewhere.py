"""Tokens that were routed elsewhere, as further rows of a fit: what keeps an expert right for text of other kinds.

A token of another kind may reach an expert with inputs that it never saw in calibration. So each stored expert is also
asked for what its members say of tokens that none of them was picked for.
"""

from dataclasses import replace

import torch

from hf_mcsmoe.calibration.inputs import LayerInputs
from hf_mcsmoe.repair.fit import LayerFit, original_sum

# Rows a stored expert: twice its width, but no more than so many.
MOST_ROWS = 512
# Members of a stored expert that are asked, those of the largest gates.
MOST_MEMBERS = 8


def with_elsewhere(layer: LayerFit, weight: float, seed: int = 0) -> LayerFit:
    """Return the layer with a sample of tokens routed elsewhere as further rows, each of one stored expert alone.

    Their targets are the members' outputs, mixed by the gates that these received. Held-out tokens are not among them,
    and the rows are not held out. A pruned layer, whose experts have no members, is returned as it is. Tried: to ask
    its experts for the outputs that they have costs on text of every kind (64 experts cut to 32: KL .136 for .118 in
    the calibrated domains, .336 for .316 out of them, refitted jointly).

    Args:
        weight: of an expert's further rows together, in multiples of what its own tokens weigh; 0 for none.
        seed: of the sample.
    """
    if weight == 0 or layer.expert_map is None or layer.experts.has_post_expert_norm:
        return layer
    generator, mass = torch.Generator().manual_seed(seed), _gate_sums(layer)
    parts = [_rows(layer, expert, weight, mass, generator) for expert in range(layer.experts.num_experts)]
    tokens, picks, gates, members, shares = (torch.cat(part) for part in zip(*parts, strict=True))
    if not len(tokens):
        return layer
    inputs = _extended(layer.inputs, tokens, picks[:, None], gates[:, None], layer.experts.num_experts)
    original_inputs = _extended(layer.original_inputs, tokens, members, shares, len(layer.originals))
    longer = replace(layer, inputs=inputs, original_inputs=original_inputs, given=layer.target())
    added = torch.arange(len(layer.inputs), len(inputs))
    longer.given = torch.cat([layer.target(), original_sum(longer, token=added)])
    return longer


def _gate_sums(layer: LayerFit) -> torch.Tensor:
    """Return the sum of the gates of each original expert, [E + 1], where the last is of none."""
    inputs = layer.original_inputs
    sums = torch.zeros(len(layer.originals) + 1)
    return sums.index_add_(0, inputs.index.flatten(), inputs.weights.float().abs().flatten())


def _rows(
    layer: LayerFit, expert: int, weight: float, mass: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Return tokens int [n], the expert and its gates [n], and its members and their gates [n, MOST_MEMBERS]."""
    seen, gates = layer.tokens_of(expert)
    elsewhere = ~layer.inputs.held_out
    elsewhere[seen] = False
    others = elsewhere.nonzero()[:, 0]
    number = min(len(others), MOST_ROWS, 2 * layer.originals.tensors["up"][0].shape[0]) if len(seen) else 0
    token = others[torch.randperm(len(others), generator=generator)[:number]]
    gate = (weight * gates.float().square().sum() / max(number, 1)).sqrt()
    ids = [member for member, stored in enumerate(layer.expert_map or ()) if stored == expert]
    order = mass[ids].argsort(descending=True)[:MOST_MEMBERS]
    shares = mass[ids][order] / mass[ids][order].sum().clamp(min=torch.finfo(mass.dtype).tiny)
    members = torch.full((MOST_MEMBERS,), len(layer.originals))
    members[: len(order)] = torch.tensor(ids, dtype=torch.int64)[order]
    weights = torch.zeros(MOST_MEMBERS)
    weights[: len(order)] = gate * shares
    return (
        token,
        torch.full((number,), expert),
        gate.expand(number),
        members.expand(number, -1),
        weights.expand(number, -1),
    )


def _extended(
    inputs: LayerInputs, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, none: int
) -> LayerInputs:
    """Return the inputs with some of the tokens once more, with picks [n, K] of their own; `none` is no expert."""
    wide = max(inputs.index.shape[1], index.shape[1])
    picks = [torch.nn.functional.pad(one, (0, wide - one.shape[1]), value=none) for one in (inputs.index, index)]
    gates = [torch.nn.functional.pad(one, (0, wide - one.shape[1])) for one in (inputs.weights, weights)]
    return replace(
        inputs,
        hidden=torch.cat([inputs.hidden, inputs.hidden[tokens]]),
        index=torch.cat(picks),
        weights=torch.cat([gates[0].float(), gates[1].float()]),
        held_out=torch.cat([inputs.held_out, torch.zeros(len(tokens), dtype=torch.bool)]),
        domain=torch.cat([inputs.domain, inputs.domain[tokens]]),
    )
