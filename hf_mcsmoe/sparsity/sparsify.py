"""Weights or hidden units inside experts that matter least are left out, layer by layer (MoE-Pruner, Wanda)."""

from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.calibration.collect import add_sums
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import saved_costs
from hf_mcsmoe.layers.batches import Batch, run_routed
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.experts import Expert, permute
from hf_mcsmoe.methods.sparsity import PATTERN, SCORE, kept_units
from hf_mcsmoe.methods.view import LayerView, Sums
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.modeling.quantized_mcsmoe import quantized_modules
from hf_mcsmoe.record import SPARSITY, Step
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.width import narrow_model, put_container

Progress = Callable[[str, int, int], None]


def sparsify_experts(
    model: PreTrainedModel | Layers,
    batches: Iterable[Batch] | None = None,
    config: SparsityConfig | None = None,
    *,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Leave out, in place, what matters least inside the experts of a model, compressed or not; returns the model.

    Zeros save neither bytes nor time where nothing makes use of them; with the pattern "units" experts become narrower
    in all layers alike, and the configuration says so: the model is one of its family with narrower experts. What is
    left is not adapted; `repair_experts` or a distillation does that.

    Args:
        model: on one device; experts dense.
        batches: calibration data, for scores that read what experts see. Every layer is scored in one pass, with what
            the model was before.
        progress: called as `progress(layer name, layers done, layers)`, first when none is done.

    Raises:
        ValueError: a score that reads data without any, a pattern that the experts' sizes or the family do not allow,
            experts that are low rank, quantized or offloaded, or weights that are not finite.
    """
    check_given(config=(config, (SparsityConfig, NoneType)))
    config, found = config or SparsityConfig(), Layers.of(model)
    check_whole(found.model, "what goes inside experts")
    check_weights(found.source)
    check_sparsity(found, config, has_data=batches is not None)
    sparsify_layers(found, list(as_batches(batches, found.model)) if batches is not None else [], config, progress)
    if compression(found.model):
        record = record_of(found.model).with_step(sparsity_step(config))
        attach_record(found.model, record.with_present_costs(saved_costs(found.model)))
    return found.model


def check_sparsity(layers: Layers, config: SparsityConfig, *, has_data: bool) -> None:
    """Check, without weights or a forward, that experts can be made sparse.

    Raises:
        ValueError: see `sparsify_experts`.
    """
    if (needs := SCORE.needs(config.score)) and not has_data:
        raise ValueError(f"The score {config.score!r} reads {' and '.join(needs)}, of calibration data: pass batches.")
    if sparse_parts(layers.model) or any(True for _ in quantized_modules(layers.model)):
        raise ValueError(
            "Experts that are stored as low rank + sparse or in few bits have no weights to leave out: make them "
            "sparse first."
        )
    for layer in layers.selected(config.skip):
        width = width_of(layer, config)
        if config.pattern in PATTERN:
            for inputs in (layer.hidden_size, layer.intermediate_size):
                PATTERN[config.pattern](torch.zeros(1, inputs), config.share)
    if config.is_units:
        narrow_model(layers, width)


def width_of(layer: MoELayer, config: SparsityConfig) -> int:
    """Return how many hidden units of each expert stay, one at least."""
    return max(1, layer.intermediate_size - round(config.share * layer.intermediate_size))


def narrowed(layers: Layers, config: SparsityConfig | None) -> Layers:
    """Return layers, without weights, as wide as they are when what is asked for has been left out.

    Raises:
        ValueError: see `narrow_model`.
    """
    if config is None or not config.is_units:
        return layers
    return Layers.of(narrow_model(layers, width_of(layers[0], config))[1])


@torch.no_grad()
def sparsify_layers(
    layers: Layers,
    batches: Sequence[Batch],
    config: SparsityConfig,
    progress: Progress | None = None,
    statistics: RoutingStatistics | None = None,
) -> Layers:
    """Do what `sparsify_experts` does to what was checked, but for the record; returns the layers as they are then.

    Args:
        statistics: of the original, in place of a pass over the batches where they hold what the score reads and all
            experts are still there.
    """
    chosen, needs = layers.selected(config.skip), SCORE.needs(config.score)
    sums = known_sums(chosen, statistics, needs) or collect_sums(chosen, batches, needs)
    if progress:
        progress(chosen[0].name, 0, len(chosen))
    key, narrower = narrow_model(layers, width_of(layers[0], config)) if config.is_units else ("", None)
    done = 0
    for shared in chosen.tied:
        together = sum((sums[layer.name] for layer in shared[1:]), sums[shared[0].name])
        sparsify_shared(shared, together, config, narrower)
        done += len(shared)
        if progress:
            progress(shared[0].name, done, len(chosen))
    if config.is_units:
        setattr(layers.model.config.get_text_config(), key, width_of(layers[0], config))
    return Layers.of(layers.source)


def sparsify_shared(
    shared: Sequence[MoELayer], sums: Sums, config: SparsityConfig, narrower: PreTrainedModel | None
) -> None:
    """Leave out what scores least inside the experts that some layers share.

    Args:
        narrower: a model without weights with the width that is left; None where single weights go.
    """
    if narrower is None:
        _zero(shared[0], sums, config)
    else:
        _narrow(shared, sums, config, narrower)


def known_sums(layers: Layers, statistics: RoutingStatistics | None, names: Sequence[str]) -> dict[str, Sums] | None:
    """Return what statistics of the original tell of layers that kept all experts; None where they lack something."""
    if not names:
        return {layer.name: Sums() for layer in layers}
    for layer in layers:
        is_whole = not layer.merged or layer.expert_map == tuple(range(layer.num_experts))
        held = Sums() if statistics is None else statistics.layers.get(layer.original_name, Sums())
        if not is_whole or any(name not in held for name in names):
            return None
    return {layer.name: Sums(cast(RoutingStatistics, statistics)[layer.original_name]) for layer in layers}


def collect_sums(layers: Layers, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Sums]:
    """Return sums over batches of what the stored experts of some layers see, compressed ones included."""
    sums = {layer.name: Sums() for layer in layers}
    run_routed(layers, batches, lambda layer, routed, counted, _: add_sums(sums[layer.name], routed, counted, names))
    return sums


def _scores(view: LayerView, config: SparsityConfig, index: int) -> Expert:
    scores: Expert = SCORE[config.score](view, index)
    return scores


def _zero(layer: MoELayer, sums: Sums, config: SparsityConfig) -> None:
    """Set the weights of each expert of a layer that are left out to zero."""
    pattern = PATTERN[config.pattern]
    with layer.view(sums, 0) as view:
        for index in range(layer.num_experts):
            expert = view.experts.expert(index)
            kept = {role: pattern(score, config.share) for role, score in _scores(view, config, index).items()}
            left = {role: tensor * kept[role] if role in kept else tensor for role, tensor in expert.items()}
            view.experts.set_expert(index, left)


def _narrow(shared: Sequence[MoELayer], sums: Sums, config: SparsityConfig, narrower: PreTrainedModel) -> None:
    """Leave each expert of layers that share them the hidden units that score most, in containers of that width."""
    first, model, width = shared[0], shared[0].model, width_of(shared[0], config)
    with first.view(sums, 0) as view:
        experts = [view.experts.expert(index) for index in range(first.num_experts)]
        kept = [kept_units(_scores(view, config, index), width) for index in range(first.num_experts)]
    made = {layer.name: put_container(model, layer.name, narrower) for layer in shared}
    for layer in shared[1:]:
        for name, parameter in made[first.name].named_parameters():
            owner, _, own = name.rpartition(".")
            setattr(made[layer.name].get_submodule(owner), own, parameter)
    found = next(layer for layer in Layers.of(first.source) if layer.name == first.name)
    with found.open() as views:
        for index, (expert, units) in enumerate(zip(experts, kept, strict=True)):
            views.set_expert(index, permute(expert, units))  # which takes those alone


def sparsity_step(config: SparsityConfig) -> Step:
    """Return what the record tells of sparse experts."""
    if config.is_units:
        told = "Experts are narrower: of each, the hidden units that score least are gone"
    else:
        told = f"Inside experts the weights that score least are zero (pattern {config.pattern}), which saves no byte"
    values = config.to_dict()
    return Step(SPARSITY, values, [f"{told} (share {config.share:g}, score `{values['score']}`)."])
