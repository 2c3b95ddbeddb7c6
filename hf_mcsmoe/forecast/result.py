"""What the result of a compression holds, from shapes alone: experts of each layer, bytes of its weight files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from hf_mcsmoe.calibration.curves import LayerCurves
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.methods.budget import adaptive_budget, uniform_budget
from hf_mcsmoe.methods.choice import REDUCTIONS, Choice
from hf_mcsmoe.methods.config import CONSTANT, MergeConfig
from hf_mcsmoe.planning import check_request
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.search.choices import HEADER, choice_bytes, fixed_bytes


@dataclass(frozen=True)
class Result:
    """A result: what becomes of each layer by name (of those that share experts the first), bytes, parameters.

    `active` are the parameters that a token meets; of low rank + sparse and of few bits parameters are those of the
    dense weights that they stand for.
    """

    choices: dict[str, Choice]
    bytes: int
    parameters: int
    active: int


def result_by_hand(
    layers: Layers,
    config: MergeConfig,
    *,
    quantization: QuantizationConfig | None = None,
    low_rank: LoSparseConfig | None = None,
) -> Result:
    """Return what a compression by options ends with, exact where all experts of the layers are of one size.

    Raises:
        ValueError: see `check_request`.
    """
    check_request(layers, config)
    chosen = {shared[0].name: shared[0] for shared in layers.selected(config.skip).tied}
    counts = expected_counts(layers, config)
    choose = partial(choice_by_hand, reduce=config.reduce, quantization=quantization, low_rank=low_rank)
    choices = {name: choose(layer, counts[name]) for name, layer in chosen.items()}
    result = result_of(layers, choices, config.skip)
    numbers = {name: constants_by_hand(layer, counts[name], config) for name, layer in chosen.items()}
    added = sum(numbers[name] * layer.hidden_size for name, layer in chosen.items())
    size = result.bytes + sum(constant_bytes(layer, counts[name], config) for name, layer in chosen.items())
    return replace(result, bytes=size, parameters=result.parameters + added)


def result_of(layers: Layers, choices: Mapping[str, Choice], skip: tuple[str, ...] = ()) -> Result:
    """Return what is left when each layer becomes what was chosen for it; those of `skip` stay."""
    chosen = {shared[0].name: shared[0] for shared in layers.selected(skip).tied}
    figures, fewer, idle = figures_of(layers), 0, 0
    for name, layer in chosen.items():
        gone, one = layer.num_experts - choices[name].experts, layer.num_parameters // layer.num_experts
        fewer += gone * one
        idle += max(0, min(layer.top_k or 1, layer.num_experts) - choices[name].experts) * one
    taken = sum(choice_bytes(layer, choices[name]) for name, layer in chosen.items())
    size = fixed_bytes(layers, skip) + taken
    return Result(dict(choices), size, figures.parameters - fewer, figures.active - idle)


def predicted_effect(curves: Mapping[str, LayerCurves], result: Result) -> float | None:
    """Return the effect of a result on the model in nats per position, by curves; None where they lack one of it."""
    try:
        return sum(curves[name].effect(choice) for name, choice in result.choices.items())
    except (KeyError, ValueError):
        return None


def expected_counts(layers: Layers, config: MergeConfig) -> dict[str, int]:
    """Return the experts that each layer keeps, by name (of those that share experts the first), as far as is known.

    A budget that depends on what tokens do is taken to share its total out evenly.
    """
    groups = layers.selected(config.skip).tied
    budget = uniform_budget if config.budget == "uniform" else adaptive_budget
    alike = [torch.ones(shared[0].num_experts) for shared in groups]
    counts = budget(alike, config.experts, config.min_experts)
    return {shared[0].name: count for shared, count in zip(groups, counts, strict=True)}


def constants_by_hand(layer: MoELayer, count: int, config: MergeConfig) -> int:
    """Return how many constants stand in for pruned experts of a layer that keeps so many."""
    gone = layer.num_experts - count
    if config.reduce != "prune" or config.cuts_router or not gone:
        return 0
    return gone if config.pruned_router == CONSTANT else 1


def constant_bytes(layer: MoELayer, count: int, config: MergeConfig) -> int:
    """Return the bytes that constants take in the weight files, with their part of the header."""
    number = constants_by_hand(layer, count, config)
    return HEADER + number * layer.hidden_size * layer.model.dtype.itemsize if number else 0


def choice_by_hand(
    layer: MoELayer,
    count: int,
    reduce: str,
    *,
    quantization: QuantizationConfig | None = None,
    low_rank: LoSparseConfig | None = None,
) -> Choice:
    """Return what becomes of a layer with so many experts."""
    choice = Choice(count, reduce if reduce in REDUCTIONS else "prune")  # which may take more in headers
    if quantization:
        grids = quantization.grid(layer.hidden_size), quantization.grid(layer.intermediate_size)
        choice = replace(choice, w_in=grids[0], w_out=grids[1])
    if low_rank and low_rank.rank and count < layer.num_experts:
        choice = replace(choice, rank=low_rank.rank, keep=low_rank.keep)
    return choice
