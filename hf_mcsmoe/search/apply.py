"""A choice put into effect: the plan of fewer experts, and the fit, rounding and storing of each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hf_mcsmoe.calibration.inputs import LayerInputs, num_sequences, stream_inputs
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.whole import convert_whole
from hf_mcsmoe.low_rank.decompose import decompose_container
from hf_mcsmoe.methods.choice import Choice
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.quantization.balance import balanced_grids
from hf_mcsmoe.quantization.layer import Grids, quantize_layer
from hf_mcsmoe.quantization.packing import store_codes
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import map_of_fit, matching_layers, student_inputs
from hf_mcsmoe.repair.rows import Fitted, few_rows
from hf_mcsmoe.search.curves import plan_with
from hf_mcsmoe.search.student import refit_method

Progress = Callable[[str, int, int], None]


def plan_choices(
    layers: Layers, statistics: RoutingStatistics, merge: MergeConfig, choices: Mapping[str, Choice]
) -> MergePlan:
    """Return the plan that leaves each layer the experts of its choice, by the reduction of its choice."""
    groups = layers.selected(merge.skip).tied
    plans = {}
    for reduce in dict.fromkeys(choice.reduce for choice in choices.values()):
        # Of layers of another reduction this plan is not read.
        counts = [choices[x.name].experts if choices[x.name].reduce == reduce else x.num_experts for x, *_ in groups]
        plans[reduce] = plan_with(layers, statistics, merge, counts, reduce)
    items = {
        layer.name: plans[choices[shared[0].name].reduce].layers[layer.name] for shared in groups for layer in shared
    }
    return replace(next(iter(plans.values())), layers=items)


@dataclass(frozen=True)
class Stored:
    """What was found while layers were fitted and stored.

    `gains` is by the layers' names what is left of the errors of rounding where experts share out the bits of a layer;
    `few_rows` tells of too few rows for the fits, None where these do.
    """

    gains: dict[str, float]
    few_rows: str | None = None


def is_converted(choice: Choice) -> bool:
    """Tell whether a layer of which all experts stay takes the form of a merged one, since they are stored anew."""
    return choice.w_in is not None or choice.rank is not None


@torch.no_grad()
def store_layer(
    pair: tuple[MoELayer, MoELayer],
    inputs: LayerInputs,
    original_inputs: LayerInputs,
    choice: Choice,
    repair: RepairConfig,
    bits: Sequence[int] = (),
) -> tuple[float | None, Fitted | None]:
    """Fit, round and store a layer of a merged model against its original, in place, as chosen.

    Args:
        pair: the layer, in the form of a merged one, and its original.
        inputs: what the layer's experts see where the original's see `original_inputs`.
        bits: see `store_choices`.

    Returns:
        What is left of the errors of rounding where experts share out the bits, else None; and what output matrices
        were fitted to, where they were.
    """
    layer, original = pair
    with original.open() as weights:
        if choice.rank is not None:
            decompose_container(layer.container, choice.rank, choice.keep, inputs)
        fit = LayerFit(layer.name, layer.container, weights, inputs, original_inputs, map_of_fit(layer))
        w_in: Grids | None = choice.w_in
        w_out: Grids | None = choice.w_out
        gain = None
        if bits and choice.w_in and choice.w_out:
            balanced = balanced_grids(fit, choice.w_in, choice.w_out, bits)
            w_in, w_out, gain = balanced.w_in, balanced.w_out, balanced.gain
        fitted = None if repair.method == "none" else Fitted.of(fit)
        codes = quantize_layer(fit, w_in, w_out, replace(repair, method=refit_method(fit, repair)))
    for weight, values in codes.items():
        store_codes(layer.container, weight, values)
    return gain, fitted


@torch.no_grad()
def store_choices(
    student: Layers,
    teacher: Layers,
    batches: Sequence[Batch],
    choices: Mapping[str, Choice],
    repair: RepairConfig,
    progress: Progress | None = None,
    bits: Sequence[int] = (),
) -> Stored:
    """Fit, round and store the layers of a merged model, in place, as chosen.

    Args:
        student: what `merge_layers` made of `teacher` by the plan of the choices.
        repair: how output matrices are fitted, as the curves were measured.
        bits: that experts of a layer may have beside those chosen for it, in no more bytes; none leaves them equal.
        progress: called as `progress(layer name, layers done, layers)`.
    """
    model = student.model
    for layer in student:
        choice = choices.get(layer.original_name)
        if choice is not None and not layer.merged and is_converted(choice):
            convert_whole(model, layer)
    student = Layers.of(student.source)
    if not any(layer.merged for layer in student):
        return Stored({})
    gains: dict[str, float] = {}
    fitted: dict[str, Fitted] = {}
    groups = matching_layers(student, teacher)
    originals = [[original for _, original in pairs] for pairs in groups]
    streamed = stream_inputs(originals, batches, memory_limit=repair.memory_limit)
    with evaluation_mode(model), evaluation_mode(teacher.model):
        for done, (pairs, (_, inputs)) in enumerate(zip(groups, streamed, strict=True), 1):
            layer, original = pairs[0]
            seen = student_inputs(pairs, inputs, batches)
            gain, fit = store_layer(pairs[0], seen, inputs, choices[original.name], repair, bits)
            gains |= {} if gain is None else {original.name: gain}
            fitted |= {} if fit is None else {layer.name: fit}
            if progress:
                progress(layer.name, done, len(groups))
    write_description(model)
    return Stored(gains, few_rows(fitted, sum(map(num_sequences, batches))))
