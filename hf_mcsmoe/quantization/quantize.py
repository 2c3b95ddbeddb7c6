"""Experts in few bits: merged, pruned, low rank + sparse or untouched ones, layer by layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import NoneType

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.calibration.inputs import num_sequences, stream_inputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import saved_costs
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.layers.whole import convert_whole
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.modeling.quantized_mcsmoe import quantized_modules
from hf_mcsmoe.quantization.codes import Codes
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.quantization.expert_bits import IMPORTANCE, grids_by_importance
from hf_mcsmoe.quantization.layer import Grids, quantize_layer, round_experts
from hf_mcsmoe.quantization.packing import store_codes
from hf_mcsmoe.record import Step
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import map_of_fit, matching_layers, paired_inputs
from hf_mcsmoe.repair.rows import Fitted, few_rows

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def quantize_experts(
    student: PreTrainedModel | Layers,
    teacher: PreTrainedModel | Layers | None = None,
    batches: Iterable[Batch] | None = None,
    config: QuantizationConfig | None = None,
    *,
    repair: RepairConfig | None = None,
    progress: Progress | None = None,
    statistics: RoutingStatistics | None = None,
) -> PreTrainedModel:
    """Store the experts of a compressed model, in place, in few bits, and return the model.

    Layers whose experts the merge kept all (`MergeConfig(experts=1.0)`: bits without merging) are quantized as well;
    those that `MergeConfig.skip` left out stay as they are. Routers and all else do too.

    Args:
        student: what `merge_experts` or `compress` returned, on one device; low rank + sparse experts in compact form.
        teacher: the original model, which the output matrices are refitted to; None for the student as it was.
        batches: calibration data. Values are rounded where it feels that least; without, to the nearest.
        config: bits, groups and method.
        repair: how output matrices are refitted once W_in is rounded; None for not at all. See `quantize_layer`.
        progress: called as `progress(layer name, layers done, layers)`, first when none is done.
        statistics: of the original model, for bits by an importance that reads them.

    Raises:
        ValueError: a model that is not compressed, or quantized already; groups that do not divide an axis; a layer
            whose experts are shared, offloaded, or in a training form; bits by importance, or a repair, without data;
            or without the statistics that the importance reads.
    """
    check_given(config=(config, (QuantizationConfig, NoneType)), repair=(repair, (RepairConfig, NoneType)))
    found, config = Layers.of(student), config or QuantizationConfig()
    check_whole(found.model, "what is stored in few bits")
    original = None if teacher is None else Layers.of(teacher)
    found, few = quantize_layers(
        found, original, batches, config, repair=repair, progress=progress, statistics=statistics
    )
    record = record_of(found.model).with_step(quantization_step(config, few))
    attach_record(found.model, record.with_present_costs(saved_costs(found.model)))
    return found.model


@torch.no_grad()
def quantize_layers(
    found: Layers,
    teacher: Layers | None,
    batches: Iterable[Batch] | None,
    config: QuantizationConfig,
    *,
    repair: RepairConfig | None = None,
    progress: Progress | None = None,
    statistics: RoutingStatistics | None = None,
) -> tuple[Layers, str | None]:
    """Do what `quantize_experts` does, but for the record.

    Returns the layers as they are then, and the sentence that tells of too few rows for the repair, see `few_rows`.
    """
    model, given = found.model, None if batches is None else list(as_batches(batches, found.model))
    chosen = layers_to_quantize(found, config)
    check_data(config, repair, has_data=bool(given))
    sums = {layer.original_name: _sums(layer, config, statistics) for layer in chosen}
    names = {layer.original_name for layer in chosen}
    for layer in chosen:
        if not layer.merged:
            convert_whole(model, layer)
    found = Layers.of(found.source)
    chosen = found.only([layer for layer in found if layer.original_name in names])
    if progress:
        progress(chosen[0].name, 0, len(chosen))
    fitted: dict[str, Fitted] = {}
    with evaluation_mode(model):
        for done, (layer, seen) in enumerate(_quantized(chosen, teacher, given, config, repair, sums), 1):
            if repair and seen:
                fitted[layer.name] = seen
            if progress:
                progress(layer.name, done, len(chosen))
    write_description(model)
    return Layers.of(found.source), few_rows(fitted, sum(map(num_sequences, given or ())))


def layers_to_quantize(layers: Layers, config: QuantizationConfig) -> Layers:
    """Return the layers whose experts are to be quantized: merged ones, and those that the merge kept whole.

    Raises:
        ValueError: see `quantize_experts`.
    """
    described = compression(layers.model)
    if not described:
        raise ValueError(
            "The model is not compressed: quantize its experts with `compress(model, batches, MergeConfig("
            "experts=1.0), quantization=QuantizationConfig(...))`, which merges none of them."
        )
    if any(True for _ in quantized_modules(layers.model)):
        raise ValueError("The model's experts are quantized already: quantize the model that it was made of.")
    known = [layer for layer in layers if layer.merged or layer.name in described.get("whole", [])]
    if not known:
        raise ValueError("The model has no merged layer to quantize.")
    chosen = layers.only(known).selected(config.skip)
    if any(len(shared) > 1 for shared in chosen.tied):
        raise ValueError("Layers that share their experts cannot be quantized; name them in `skip`.")
    config.check_layers(chosen)
    if training := sparse_parts(layers.model):
        raise ValueError(
            f"{next(iter(training))} is low rank + sparse in its training form: `compact` the model first, then "
            "quantize it."
        )
    for layer in chosen:
        if any(parameter.is_meta for _, parameter in layer.parameters):
            raise ValueError(f"The experts of {layer.name} are offloaded; load the merged model onto one device.")
    return chosen


def check_data(config: QuantizationConfig, repair: RepairConfig | None, *, has_data: bool) -> None:
    """Raise ValueError where something that reads calibration data is asked for without any."""
    if not has_data and config.low_bits is not None:
        raise ValueError(f"low_bits={config.low_bits} is for experts that calibration data tell: pass batches.")
    if not has_data and repair is not None:
        raise ValueError(f"The repair {repair.method!r} fits to calibration data: pass batches, or leave it out.")


def quantization_step(config: QuantizationConfig, few: str | None = None) -> Step:
    """Return what the record tells of quantized experts, and of too few rows for their repair."""
    fewer = f" ({config.low_bits} of the least important experts)" if config.low_bits else ""
    around = "values lie around zero" if config.symmetric else "groups have zero points"
    lines = [
        f"The matrices of stored experts are held in {config.bits} bits a weight{fewer}, in groups along the input",
        f"axis with a scale each; {around}.",
    ]
    told = ["", few] if few else []
    return Step("Quantization", config.to_dict(), [*lines, *told], {"few_rows": few} if few else {})


def _quantized(
    layers: Layers,
    teacher: Layers | None,
    batches: Sequence[Batch] | None,
    config: QuantizationConfig,
    repair: RepairConfig | None,
    sums: Mapping[str, Sums],
) -> Iterator[tuple[MoELayer, Fitted | None]]:
    """Quantize and store one layer after the other; yield each when it is done, with what it was fitted to, if any."""
    if batches is None:
        for layer in layers:
            codes = round_experts(layer.container, *_grids(layer, config, None))
            _store(layer, codes)
            yield layer, None
        return
    fits = _own_fits(layers, batches) if teacher is None else _fits(layers, teacher, batches, repair)
    for layer, fit in fits:
        yield layer, quantize_fit(layer, fit, config, repair, sums[layer.original_name])


def quantize_fit(
    layer: MoELayer, fit: LayerFit, config: QuantizationConfig, repair: RepairConfig | None, sums: Sums
) -> Fitted:
    """Quantize and store one layer that calibration data were run through; returns what it was fitted to."""
    fit.sums, fit.members = sums, layer.members
    codes = quantize_layer(fit, *_grids(layer, config, fit), repair, config.method)
    seen = Fitted.of(fit)  # before all but the codes is gone
    _store(layer, codes)
    return seen


def _own_fits(layers: Layers, batches: Sequence[Batch]) -> Iterator[tuple[MoELayer, LayerFit]]:
    """Yield each layer beside a copy of itself as it was."""
    for (layer,), inputs in stream_inputs([[layer] for layer in layers], batches):
        weights = layer.read()
        originals = replace(
            weights, tensors={role: torch.stack(list(tensor)) for role, tensor in weights.tensors.items()}
        )
        identity = list(range(layer.num_experts))
        yield layer, LayerFit(layer.name, layer.container, originals, inputs, inputs, identity)


def _fits(
    layers: Layers, teacher: Layers, batches: Sequence[Batch], repair: RepairConfig | None
) -> Iterator[tuple[MoELayer, LayerFit]]:
    """Yield each layer beside the original one."""
    groups = matching_layers(layers, teacher)
    with evaluation_mode(teacher.model):
        for pairs, inputs, original_inputs in paired_inputs(groups, list(batches), repair or RepairConfig()):
            layer, original = pairs[0]
            with original.open() as weights:
                yield (
                    layer,
                    LayerFit(layer.name, layer.container, weights, inputs, original_inputs, map_of_fit(layer)),
                )


def _sums(layer: MoELayer, config: QuantizationConfig, statistics: RoutingStatistics | None) -> Sums:
    """Return the statistics of a layer's original, where there are any, with all that the importance reads."""
    sums = Sums() if statistics is None else statistics[layer.original_name]
    sums.check(config.needs)
    return sums


def _grids(layer: MoELayer, config: QuantizationConfig, fit: LayerFit | None) -> tuple[Grids, Grids]:
    """Return the grids of W_in and W_out of a layer, one for each expert where its importance counts."""
    grids: list[Grid] = [config.grid(width) for width in (layer.hidden_size, layer.intermediate_size)]
    if config.low_bits is None or fit is None:
        return grids[0], grids[1]
    importance = IMPORTANCE[config.importance](fit)
    first, second = (grids_by_importance(grid, config.low_bits, config.low_share, importance) for grid in grids)
    return first, second


def _store(layer: MoELayer, codes: dict[str, list[Codes]]) -> None:
    for weight, values in codes.items():
        store_codes(layer.container, weight, values)
