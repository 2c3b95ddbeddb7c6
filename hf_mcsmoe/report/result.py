"""What the folder of a result tells, read from its JSON files and the structure of its model; loads no weights."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_mcsmoe.evaluation.costs import folder_bytes, layer_bytes
from hf_mcsmoe.files import damage
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.loading import empty_model
from hf_mcsmoe.modeling.saving_mcsmoe import PLAN_FILE, RECORD_FILE
from hf_mcsmoe.plan import LayerPlan, MergePlan
from hf_mcsmoe.record import Record, Stored, public_name


@dataclass(frozen=True)
class LayerResult:
    """One layer: `expert_map` int [E] -> [G], -1 where pruned, and its bytes before and after; None where untold.

    `dominant` int [G], `similarity` [E] to the dominant expert, `counts` int [E] picks in the calibration data, and
    the relative errors of its outputs before and after the repair. `stored` is what the configuration says of it, and
    `bits` those of a weight, the mean over its matrices.
    """

    name: str
    expert_map: list[int]
    bytes_before: int
    bytes_after: int
    dominant: list[int] | None = None
    similarity: list[float | None] | None = None
    counts: list[int] | None = None
    error_before: float | None = None
    error_after: float | None = None
    stored: Stored | None = None
    bits: float | None = None

    @property
    def groups(self) -> list[list[int]]:
        """The experts of each group, the dominant one first."""
        members: dict[int, list[int]] = {}
        for expert, group in enumerate(self.expert_map):
            if group >= 0:
                members.setdefault(group, []).append(expert)
        first = set(self.dominant or ())
        return [sorted(members[group], key=lambda expert: (expert not in first, expert)) for group in sorted(members)]

    @property
    def pruned(self) -> list[int]:
        """The experts that are gone."""
        return [expert for expert, group in enumerate(self.expert_map) if group < 0]

    @property
    def order(self) -> list[int]:
        """The experts in the order of their groups, those that are gone last."""
        return [*(expert for group in self.groups for expert in group), *self.pruned]

    @property
    def is_merged(self) -> bool:
        """Whether it has fewer experts than before."""
        return len(self.groups) < len(self.expert_map)


@dataclass(frozen=True)
class Result:
    """One result: its name, the original's, its layers, bytes on disk of both, where they are known, and the record.

    `fingerprint` is that of the original; `similarity` names the method by which experts were alike; `stages` holds
    measures on held-out rows, "loss" and "kl", by the stages of the compression, and `judged` is the stage that the
    model as it is now is in, "" for none.
    """

    name: str
    base: str
    layers: list[LayerResult]
    bytes_before: int | None
    bytes_after: int | None
    fingerprint: str | None = None
    similarity: str | None = None
    record: Record | None = field(default=None, repr=False)
    stages: dict[str, dict[str, float | None]] = field(default_factory=dict)
    judged: str = ""

    @property
    def quality(self) -> dict[str, float]:
        """The measures of the model as it is now, those that are known."""
        return {name: value for name, value in self.stages.get(self.judged, {}).items() if value is not None}

    @property
    def experts(self) -> tuple[int, int]:
        """Experts of all layers, before and after."""
        return sum(len(layer.expert_map) for layer in self.layers), sum(len(layer.groups) for layer in self.layers)


def read_result(folder: Path) -> Result:
    """Return what a folder that this package saved tells of its model.

    A file that is not there, or of an older version, is a gap, not an error.

    Raises:
        ValueError: there is no such folder, it holds no result of this package, or one of its files is damaged.
    """
    config = _config(folder)
    plan = _parsed(folder / PLAN_FILE, lambda text: MergePlan.load(folder / PLAN_FILE))
    record = _parsed(folder / RECORD_FILE, Record.from_json)
    entries = _entries(folder, config, plan, record)
    layers = Layers.of(empty_model(str(folder)))
    _check_maps(folder, layers, plan, entries)
    errors = _errors(folder, record)
    sizes = layer_bytes(layers)
    told = [_layer(shared[0], sizes, plan, errors, entries) for shared in layers.tied]
    costs = list(record.costs.values()) if record else []
    return Result(
        folder.resolve().name,
        _base(config, plan, record),
        told,
        costs[0].bytes_on_disk or costs[0].bytes_resident if costs else None,
        folder_bytes(folder) or (costs[-1].bytes_on_disk if costs else None),
        plan.fingerprint if plan else None,
        plan.config.get("similarity") if plan else None,
        record,
        _quality(folder, record),
        record.judged if record else "",
    )


def _base(config: dict[str, Any], plan: MergePlan | None, record: Record | None) -> str:
    """Return what the original is called, or what family it is of."""
    if record:
        return record.base.name
    return public_name(str(plan.provenance.get("model"))) if plan else str(config.get("base_model_type"))


def _config(folder: Path) -> dict[str, Any]:
    """Return the content of the configuration of a folder of ours."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that `hf-mcsmoe compress` or `distill` wrote.")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json, so no model: name a folder that `hf-mcsmoe compress` wrote.")
    config = _parsed(file, json.loads)
    return config if isinstance(config, dict) else {}


def _entries(
    folder: Path, config: dict[str, Any], plan: MergePlan | None, record: Record | None
) -> dict[str, dict[str, Any]]:
    """Return what became of each layer, as `config.mcsmoe` tells it; of a plain model, as its plan does.

    Raises:
        ValueError: it is no result of this package.
    """
    if config.get("model_type") == "mcsmoe":
        return config["mcsmoe"]["layers"]
    if plan is None or record is None or not record.is_plain:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}, which this package did not compress: there "
            "is nothing to draw."
        )
    entries: dict[str, dict[str, Any]] = {}
    for name, item in plan.layers.items():
        if item.kept is not None:
            entries[name] = {"num_experts": len(item.expert_map), "kept": item.kept}
        elif not item.is_whole:  # merged, and exported
            entries[name] = {"num_experts": len(item.expert_map), "expert_map": item.expert_map}
    return entries


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    """Return what a file says; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    if not file.exists():
        return None
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({damage(error)}): take it from the original folder, or delete it."
        ) from None


def _check_maps(folder: Path, layers: Layers, plan: MergePlan | None, entries: dict[str, dict[str, Any]]) -> None:
    for layer in layers:
        item = plan.layers.get(layer.original_name) if plan else None
        if item and item.stored_map != _map(layer, entries.get(layer.original_name)):
            raise ValueError(
                f"{folder / PLAN_FILE} groups the experts of {layer.original_name} otherwise than config.json does: "
                "it is the plan of another result; take it from the original folder, or delete it."
            )


def _map(layer: MoELayer, entry: dict[str, Any] | None) -> list[int]:
    """Return the group of each original expert; -1 for one that was pruned away."""
    if entry is None:
        return list(range(layer.num_experts))
    if "kept" not in entry:
        gone = entry.get("approximate_experts", ())
        return [-1 if expert in gone else group for expert, group in enumerate(entry["expert_map"])]
    places = {expert: place for place, expert in enumerate(entry["kept"])}
    return [places.get(expert, -1) for expert in range(entry["num_experts"])]


def _errors(folder: Path, record: Record | None) -> dict[str, tuple[float | None, float | None]]:
    """Return the relative errors of layers before and after the repair, by their name."""
    steps = (
        [step.figures["relative_error"] for step in record.steps if "relative_error" in step.figures] if record else []
    )
    try:
        found = {name: (item["before"], item["after"]) for step in steps for name, item in step.items()}
        if not all(_is_number(value) for pair in found.values() for value in pair):
            raise ValueError("not all are numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / RECORD_FILE} is damaged: its errors of layers are none ({damage(error)})."
        ) from None
    return found


def _quality(folder: Path, record: Record | None) -> dict[str, dict[str, float | None]]:
    """Return the measures of each stage."""
    found = {stage: asdict(quality) for stage, quality in (record.quality if record else {}).items()}
    if not all(value is None or _is_number(value) for values in found.values() for value in values.values()):
        raise ValueError(f"{folder / RECORD_FILE} is damaged: its measures of quality are no numbers.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layer(
    layer: MoELayer,
    sizes: dict[str, tuple[int, int]],
    plan: MergePlan | None,
    errors: dict[str, tuple[float | None, float | None]],
    entries: dict[str, Any],
) -> LayerResult:
    item: LayerPlan | None = plan.layers.get(layer.original_name) if plan else None
    # Errors are told under the name of the layer as it was repaired.
    before, after = errors.get(layer.name, (None, None))
    entry = entries.get(layer.original_name)
    stored = Stored.of(entry) if entry else Stored(layer.num_experts, layer.num_experts)
    bits = list(stored.bits.values()) or [8.0 * layer.model.dtype.itemsize]
    held, kept = sizes[layer.original_name]
    return LayerResult(
        layer.original_name,
        _map(layer, entry),
        held * stored.before // layer.num_original,  # a plain model knows of no experts that it had before
        kept,
        dominant=item.dominant if item else None,
        similarity=item.similarity if item else None,
        counts=item.counts if item else None,
        error_before=before,
        error_after=after,
        stored=replace(stored, bytes=kept),
        bits=sum(bits) / len(bits),
    )
