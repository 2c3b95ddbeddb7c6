"""Repair of a merged model against its original, layer by layer, without end-to-end training."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.calibration.inputs import LayerInputs, capture_inputs, num_sequences, stream_inputs
from hf_mcsmoe.calibration.pruned import pruned_inputs
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.layers.batches import Batch, evaluation_mode
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.processes import current
from hf_mcsmoe.record import Step
from hf_mcsmoe.repair.fit import LayerFit
from hf_mcsmoe.repair.made import made_batches
from hf_mcsmoe.repair.methods import REPAIR, LayerRepair, RepairConfig
from hf_mcsmoe.repair.rows import Fitted, few_rows

# Why layers with constants are not repaired one after the other.
SEQUENTIAL = (
    "sequential=True looks at the experts that a token reaches, of which constants are none: leave it out for experts "
    "that were pruned with pruned_router='zero' or 'constant'."
)

Progress = Callable[[str, int, int], None]
Pair = tuple[MoELayer, MoELayer]


@dataclass(frozen=True)
class RepairReport:
    """What a repair did: its options, what became of each layer (of those that share experts the first), seconds.

    `rows` are the sequences of the calibration data.
    """

    config: dict[str, Any]
    layers: dict[str, LayerRepair]
    seconds: float
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        layers = {
            name: {**asdict(layer), "experts": [expert.to_dict() for expert in layer.experts]}
            for name, layer in self.layers.items()
        }
        return {"config": self.config, "layers": layers, "seconds": self.seconds, "rows": self.rows}

    def step(self) -> Step:
        """Return what the record of the model tells, with each layer's held-out errors before and after."""
        told = (
            "Each changed layer was fitted to the original one on the calibration data, layer by layer (method "
            f"`{self.config['method']}`)."
        )
        few = self.few_rows()
        more = [sentence for sentence in (self.shortfall(), few) if sentence]
        errors = {name: {"before": layer.before, "after": layer.after} for name, layer in self.layers.items()}
        lines = [told, *(line for sentence in more for line in ("", sentence))]
        return Step("Repair", self.config, lines, {"relative_error": errors, **({"few_rows": few} if few else {})})

    def unfitted(self, name: str) -> list[int]:
        """Return the experts of a layer that had lost something and stayed as they were.

        "local" trains all of a layer together, and keeps the result or nothing.
        """
        layer = self.layers[name]
        if self.config["method"] == "local":
            return [] if layer.is_better else layer.lossy
        return [expert for expert in layer.lossy if expert in layer.unchanged]

    def shortfall(self) -> str | None:
        """Return the sentence that tells which experts could not be improved; None where all were."""
        places = [
            f"{name} (experts {', '.join(map(str, experts))}; {layer.tokens:,} tokens in the layer)"
            for name, layer in self.layers.items()
            if (experts := self.unfitted(name))
        ]
        if not places:
            return None
        total = sum(len(layer.lossy) for layer in self.layers.values())
        return (
            f"The repair left {sum(len(self.unfitted(name)) for name in self.layers)} of the {total} experts that it "
            "was to fit as they were, because too few tokens reached them or no fit did better on tokens held out: "
            f"{', '.join(places)}."
        )

    def few_rows(self) -> str | None:
        """Return the sentence that tells how many rows would do; None where these do."""
        if self.config["method"] == "mean_shift":
            return None
        layers = {
            name: Fitted(int(statistics.median(expert.tokens for expert in layer.experts)), layer.unknowns)
            for name, layer in self.layers.items()
            if layer.experts
        }
        return few_rows(layers, self.rows)


def repair_experts(
    student: PreTrainedModel | Layers,
    teacher: PreTrainedModel | Layers,
    batches: Iterable[Batch],
    config: RepairConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Change the experts of a merged model, in place, so that each layer does what the original's layer does.

    One layer is worked on at a time and no gradient passes through the model; routers and all else stay as they are.
    Of several processes, see `together`, each fits a share of the experts, or with "joint" and "local" of the layers.

    Args:
        student: what `merge_experts` made of `teacher`, on one device.
        teacher: the original model; left as it was.
        batches: dictionaries for `model(**batch)`, as for `collect_statistics`; `tokenizer` as there.
        progress: called as `progress(layer name, layers done, layers)`, first when none is done.

    Raises:
        ValueError: a student that is not a compressed model of this teacher, no batches, activations that are not
            finite, or a layer that the method cannot repair.
    """
    check_given(config=(config, (RepairConfig, NoneType)))
    config, begin = config or RepairConfig(), time.perf_counter()
    student, teacher = Layers.of(student), Layers.of(teacher)
    for found in (student, teacher):
        check_whole(found.model, "a repair")
    groups = matching_layers(student, teacher)
    batches = list(as_batches(batches, teacher.model, tokenizer))
    if not batches:
        raise ValueError("The calibration set is empty: pass at least one batch.")
    rows = sum(map(num_sequences, batches))
    batches += made_batches(teacher.model, batches, config.made, config.seed)
    report = RepairReport(config.to_dict(), {}, 0.0)
    if config.method == "none":
        return report
    total, done = sum(map(len, groups)), 0
    if progress:
        progress(groups[0][0][0].name, 0, total)
    spread = _spread(groups, config)
    with torch.no_grad(), evaluation_mode(student.model), evaluation_mode(teacher.model):
        for number, (pairs, inputs, original_inputs) in enumerate(paired_inputs(groups, batches, config)):
            name = pairs[0][0].name
            if not spread or number % current().size == current().rank:
                report.layers[name] = repair_layer(pairs[0], inputs, original_inputs, config)
            done += len(pairs)
            if progress:
                progress(name, done, total)
        if spread:
            _share_layers([pairs[0][0] for pairs in groups], report)
    return RepairReport(report.config, report.layers, time.perf_counter() - begin, rows)


def _spread(groups: list[list[Pair]], config: RepairConfig) -> bool:
    """Tell whether each of several processes repairs some of the layers, and not some experts of each of them.

    Those of a pruned model may have to see what became of the layers before them.
    """
    by_layer = config.method in ("joint", "local") and not config.sequential
    return by_layer and current().size > 1 and all(pairs[0][0].kept is None for pairs in groups)


def _share_layers(layers: list[MoELayer], report: RepairReport) -> None:
    """Give all processes what became of the layers that each of them repaired."""
    processes = current()
    for number, layer in enumerate(layers):
        own = {name: value.detach().cpu() for name, value in layer.container.named_parameters()}
        found: Any = (report.layers.get(layer.name), own)
        report.layers[layer.name], values = processes.sent(found, number % processes.size)
        for name, parameter in layer.container.named_parameters():
            parameter.copy_(values[name])


def matching_layers(student: PreTrainedModel | Layers, teacher: PreTrainedModel | Layers) -> list[list[Pair]]:
    """Return the student's merged layers with the teacher's, in lists that share one set of experts.

    Raises:
        ValueError: they do not fit together, or the student's experts are offloaded.
    """
    student, teacher = Layers.of(student), Layers.of(teacher)
    originals = {layer.name: layer for layer in teacher.uncompressed()}
    kinds = type(student.model).__name__, type(teacher.model).__name__
    merged = student.only([layer for layer in student if layer.merged])
    if not len(merged):
        raise ValueError(f"{kinds[0]} has no merged layer to repair; pass what merge_experts returned.")
    if not isinstance(student.model, type(teacher.model)):
        raise ValueError(f"{kinds[0]} is no compressed {kinds[1]}: it was made of another model.")
    groups = []
    for shared in merged.tied:
        groups.append([(layer, original_of(layer, originals)) for layer in shared])
        if any(parameter.is_meta for _, parameter in shared[0].parameters):
            raise ValueError(f"The experts of {shared[0].name} are offloaded; load the merged model onto one device.")
    return groups


def original_of(layer: MoELayer, originals: dict[str, MoELayer]) -> MoELayer:
    """Return what a merged layer was made of, of the original's layers by name.

    Raises:
        ValueError: none of them, or one of other sizes.
    """
    original = originals.get(layer.original_name)
    if original is None:
        raise ValueError(
            f"The merged model has experts {layer.name!r}, the original has {', '.join(originals)}: it was made of "
            "another model."
        )
    number = layer.num_original if layer.expert_map is None else len(layer.expert_map)
    ours = (number, layer.hidden_size, layer.intermediate_size)
    theirs = (original.num_experts, original.hidden_size, original.intermediate_size)
    if ours[:2] != theirs[:2] or ours[2] > theirs[2]:  # hidden units may have gone
        raise ValueError(
            f"{layer.name}: (experts, width, expert width) is {ours} in the merged model and {theirs} in the "
            "original; it was made of another model."
        )
    return original


def paired_inputs(
    groups: list[list[Pair]],
    batches: list[Batch],
    config: RepairConfig,
) -> Iterator[tuple[list[Pair], LayerInputs, LayerInputs]]:
    """Yield the layers with what the student's experts see and what the teacher's see at the same tokens.

    Raises:
        ValueError: constants stand in for experts, and layers are to be fitted in sequence.
    """
    if config.sequential and any(pairs[0][0].num_constants for pairs in groups):
        raise ValueError(SEQUENTIAL)
    originals = [[original for _, original in pairs] for pairs in groups]
    limit = config.memory_limit // 2 if config.sequential else config.memory_limit
    streamed = stream_inputs(originals, batches, memory_limit=limit)
    for pairs, (_, original_inputs) in zip(groups, streamed, strict=True):
        seen = _captured(pairs, batches) if config.sequential else student_inputs(pairs, original_inputs, batches)
        yield pairs, seen, original_inputs


def student_inputs(pairs: list[Pair], inputs: LayerInputs, batches: Iterable[Batch]) -> LayerInputs:
    """Return what the student's experts see of the teacher's `inputs`, with stored experts as picks.

    Where nobody can tell from them what the router of a pruned layer picks, it is what the student's layers see, after
    those before them have been changed.
    """
    known = known_inputs(pairs, inputs)
    return _captured(pairs, batches) if known is None else known


def known_inputs(pairs: list[Pair], inputs: LayerInputs) -> LayerInputs | None:
    """Return what the student's experts see, as far as the teacher's `inputs` tell it; None where they do not."""
    (layer, original), *others = pairs
    if layer.kept is None:
        return inputs.mapped(layer.expert_map or ())
    if not others:
        with contextlib.suppress(ValueError):
            return pruned_inputs(original, layer.kept, inputs)
    return None


def _captured(pairs: list[Pair], batches: Iterable[Batch]) -> LayerInputs:
    first, *others = capture_inputs([layer for layer, _ in pairs], batches).values()
    return sum(others, first)


def map_of_fit(layer: MoELayer) -> list[int] | None:
    """Return the map of a merged layer as a fit takes it; None for a pruned one."""
    return None if layer.expert_map is None or layer.pruned else list(layer.expert_map)


def repair_layer(pair: Pair, inputs: LayerInputs, original_inputs: LayerInputs, config: RepairConfig) -> LayerRepair:
    """Repair one layer against its original, in place, with what each sees of the same tokens."""
    begin, (layer, original) = time.perf_counter(), pair
    with original.open() as weights:
        layer_fit = LayerFit(layer.name, layer.container, weights, inputs, original_inputs, map_of_fit(layer))
        repaired: LayerRepair = REPAIR[config.method](layer_fit, config)
    return replace(repaired, seconds=time.perf_counter() - begin)
