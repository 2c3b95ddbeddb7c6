"""What was done to a compressed model, as data: base model, plan, steps, costs of each stage; JSON in and out."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_mcsmoe.files import damage

FORMAT = "mcsmoe-record"
FORMAT_VERSION = 1
# Title of the step that stores experts as low rank + sparse.
LOW_RANK = "Low rank + sparse"


@dataclass(frozen=True)
class Base:
    """The model that was compressed.

    `name` is a Hub id (with a slash) or the name of a folder; `licence` holds what its card declares of `license`,
    `license_name` and `license_link`, `language` what it declares of that.
    """

    name: str
    model_type: str
    licence: dict[str, Any] = field(default_factory=dict)
    language: list[str] = field(default_factory=list)


# The title of the step that leaves weights out: training keeps them out.
SPARSITY = "Sparsity"


# The title of the step that tells of blocks which the source held and the result does not.
DROPPED = "Left out"


@dataclass(frozen=True)
class Step:
    """What was done after the merge: a title, the options it was done with, and lines of Markdown that tell of it.

    `figures` are measures of the step, as JSON values.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """What a model costs; None where it was not measured.

    `bytes_resident` are those of parameters and buffers, `bytes_on_disk` those of a folder's safetensors files, or of
    what a stage that is not saved would write.
    `flops_per_token` counts a multiplication and an addition as two, over all positions of a batch, padding included.
    `expert_macs_per_token` is the multiply-adds of the experts alone, by layer name.
    """

    parameters: int
    bytes_resident: int
    bytes_on_disk: int | None = None
    flops_per_token: float | None = None
    expert_macs_per_token: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Quality:
    """How a stage does on held-out calibration rows, in nats per position; None where there is no such measure.

    `loss` is that of the next token, the target or the class; `kl` the divergence from the original's distributions.
    `check_loss` and `check_kl` are the same on text of another kind, where some was named.
    """

    loss: float | None = None
    kl: float | None = None
    check_loss: float | None = None
    check_kl: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What a model was compressed on: names of data, rows fitted to, and rows held out.

    `data` are Hub ids, or the last parts of paths; `check` and `check_rows` those of another kind, for judging alone.
    """

    data: list[str] = field(default_factory=list)
    rows: int = 0
    held_out: int = 0
    check: list[str] = field(default_factory=list)
    check_rows: int = 0


@dataclass(frozen=True)
class Stored:
    """What became of one layer: its experts `before` and `after`, and how these are stored in so many `bytes`.

    `reduce` is "merge" or "prune" where there are fewer; `bits` of a weight, and ranks, are told by the name of the
    weight in its container, where they apply; of bits that differ from expert to expert, the mean. `constants` are
    pruned experts in whose place the layer gives a constant, which is one for all of them, zero, where `is_zero`.
    """

    before: int
    after: int
    reduce: str = ""
    rank: dict[str, int] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    constants: int = 0
    is_zero: bool = False

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Stored":
        """Return what the entry of a layer in `config.mcsmoe["layers"]` says."""
        before, kept, gone = entry["num_experts"], entry.get("kept"), entry.get("approximate_experts", ())
        if gone:
            kept = [expert for expert in range(before) if expert not in gone]
        after = len(set(entry["expert_map"])) if kept is None else len(kept)
        reduce = "" if after == before else "merge" if kept is None else "prune"
        rank = {weight: item["rank"] for weight, item in entry.get("low_rank", {}).items()}
        bits = {weight: _mean(item["bits"]) for weight, item in entry.get("quantized", {}).items()}
        places = {entry["expert_map"][expert] for expert in gone}
        return cls(before, after, reduce, rank, bits, constants=len(gone), is_zero=len(places) < len(gone))


@dataclass(frozen=True)
class Predicted:
    """What a method was expected to cost at some bytes of weight files: `kl` in nats per position."""

    method: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class SizeChoice:
    """What was chosen for a size that was asked for, all in bytes of weight files and nats per position.

    `source` is the size of the original's files, `asked` that which was asked for, `planned` what the choice takes.
    `predicted` is the divergence that the choice was expected to cost, by layer; effects of layers add up.
    `method` is what was taken: "mixture" (chosen layer by layer) or a single method for all layers. `checked` is the
    divergence measured on held-out rows of all that were compared, by their name. `reason` says in a sentence why.
    `ladder` is what other sizes and methods were expected to cost, "chosen" for what would be chosen.
    """

    source: int
    asked: int
    planned: int
    predicted: dict[str, float] = field(default_factory=dict)
    method: str = "mixture"
    checked: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    ladder: list[Predicted] = field(default_factory=list)

    @property
    def predicted_kl(self) -> float | None:
        """The divergence that was expected of all layers together; None where nothing was predicted."""
        return sum(self.predicted.values()) if self.predicted else None


@dataclass(frozen=True)
class Record:
    """What was done to a model, for the folder that it is saved in.

    Args:
        base: the model that was compressed.
        auto_class: the Auto class that loads the result.
        plan: the merge plan as JSON values, which has a file of its own; empty where it is not known.
        steps: what followed the merge, in order.
        costs: by stage, the original first and the model as it is now last.
        quality: by stage, the original first; empty where no rows were held out.
        judged: the stage of `quality` that the model as it is now is in; empty where it was changed since.
        calibration: the data, where they are known.
        judged_on: those that `quality` was measured on, where they are others than `calibration`.
        engine: the one engine that reads the checkpoint; empty where Transformers does.
        layers: what became of each layer, by the name that it had before; empty where that is not known.
        size: what was chosen for a size; None where no size was asked for.
        is_plain: whether it is saved as a model of its family's own, which loads without any code.
        recipe: the options of the command that made the model, as YAML, which have a file of their own; empty where
            another made it, or it was changed since.
        card: the model card that was rendered from all this, with places for what is known when it is saved.
    """

    base: Base
    auto_class: str = "AutoModel"
    plan: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    costs: dict[str, Costs] = field(default_factory=dict)
    card: str = ""
    quality: dict[str, Quality] = field(default_factory=dict)
    judged: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    recipe: str = ""
    layers: dict[str, Stored] = field(default_factory=dict)
    size: SizeChoice | None = None
    is_plain: bool = False
    judged_on: Calibration | None = None
    engine: str = ""

    @property
    def judging(self) -> Calibration:
        """The data that `quality` was measured on."""
        return self.judged_on or self.calibration

    def with_step(self, step: Step) -> "Record":
        """Return the record with one more step; one of the same title is replaced, and comes last."""
        steps = (*(item for item in self.steps if item.title != step.title), step)
        return replace(self, steps=steps, judged="", recipe="")

    def with_quality(self, quality: dict[str, Quality]) -> "Record":
        """Return the record with what was measured of each stage, the last of which is the model as it is now."""
        return replace(self, quality=quality, judged=next(reversed(quality), ""))

    def with_present_costs(self, costs: Costs, stage: str = "after") -> "Record":
        """Return the record with the present costs of the model in place of those of the last stage.

        They stay, with what only a forward tells, where the model holds as much as it did, and where there are none to
        compare with.
        """
        *earlier, last = self.costs or [""]
        if not earlier or (costs.parameters, costs.bytes_resident) == _held(self.costs[last]):
            return self
        return replace(self, costs={name: self.costs[name] for name in earlier} | {stage: costs})

    def to_json(self) -> str:
        """Return all but the plan and the recipe as JSON text; of the card, a line each."""
        values = {key: value for key, value in asdict(self).items() if key not in ("plan", "recipe")}
        values["card"] = self.card.splitlines()
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **values}, indent=2) + "\n"

    def plan_json(self) -> str:
        """Return the plan as JSON text."""
        return json_text(self.plan) + "\n"

    @classmethod
    def from_json(cls, text: str, plan: dict[str, Any] | None = None) -> "Record":
        """Return the record that `to_json` wrote, with its plan.

        Raises:
            ValueError: the text is no record, one of a later format, or one with values of the wrong kind.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT or content["format_version"] > FORMAT_VERSION:
                raise ValueError(
                    f"this version reads none of format {content['format']!r}, version {content['format_version']!r}"
                )
            record = cls(
                Base(**content["base"]),
                content["auto_class"],
                plan or {},
                tuple(Step(**step) for step in content["steps"]),
                {stage: Costs(**costs) for stage, costs in content["costs"].items()},
                "".join(f"{line}\n" for line in content["card"]),
                {stage: Quality(**quality) for stage, quality in content.get("quality", {}).items()},
                content.get("judged", ""),
                Calibration(**content.get("calibration", {})),
                layers={name: Stored(**layer) for name, layer in content.get("layers", {}).items()},
                size=_size(size) if (size := content.get("size")) is not None else None,
                is_plain=content.get("is_plain", False),
                judged_on=Calibration(**judging) if (judging := content.get("judged_on")) is not None else None,
                engine=content.get("engine", ""),
            )
            stages = (*record.costs.values(), *record.quality.values(), *record.layers.values())
            rungs = record.size.ladder if record.size else []
            data = (record.calibration, record.judged_on)
            for part in (record.base, *record.steps, *stages, *data, record.size, *rungs, record):
                if part is not None:
                    _check_kinds(part)
            return record
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"This is no record of a compression ({damage(error)}).") from None


def _size(values: Mapping[str, Any]) -> SizeChoice:
    return SizeChoice(**{**values, "ladder": [Predicted(**rung) for rung in values.get("ladder", [])]})


def _check_kinds(part: Any) -> None:
    """Raise ValueError where a value of a part of a record is not what it is annotated with."""
    for name, hint in get_type_hints(type(part)).items():
        if not _is_kind(value := vars(part)[name], hint):
            raise ValueError(f"{name} is {value!r:.100}")


def _is_kind(value: Any, hint: Any) -> bool:
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (list, tuple, dict):
        entries = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and (inside[-1] in (Any, ...) or all(_is_kind(x, inside[-1]) for x in entries))
    if inside:  # one of several
        return any(_is_kind(value, choice) for choice in inside)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is int if kind is int else isinstance(value, kind)


def _mean(values: float | list[float]) -> float:
    return sum(values) / len(values) if isinstance(values, list) else values


def _held(costs: Costs) -> tuple[int, int]:
    return costs.parameters, costs.bytes_resident


def json_text(value: Any, indent: int = 0) -> str:
    """Return JSON text in which each entry of an object has a line, and so each list."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    space = " " * (indent + 2)
    rows = (f"{space}{json.dumps(key)}: {json_text(item, indent + 2)}" for key, item in value.items())
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"


def public_name(name_or_path: str | None) -> str:
    """Return a Hub id as it is, and of a path, which says nothing elsewhere, only the last part."""
    name = name_or_path or ""
    return name if is_repo_id(name) else Path(name).name


def is_repo_id(name: str) -> bool:
    """Tell whether a model's name is the id of a Hub repository, not a path of some machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).exists()
