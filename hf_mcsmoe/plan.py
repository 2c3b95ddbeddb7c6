"""The merge plan: which experts of which layer become one, with which weights; readable JSON."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_mcsmoe.files import damage, read_json, write_text
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.config import REGISTRIES, MergeConfig
from hf_mcsmoe.modeling.configuration_mcsmoe import family_of
from hf_mcsmoe.record import json_text, public_name

FORMAT = "mcsmoe-plan"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """Groups of one layer: `expert_map` int [E] -> [G], `dominant` int [G], `weights` [E] (sum 1 in each group).

    Of a layer whose router is cut `kept` says whose rows stay, int [G], rising: these are `dominant`. Of one to be
    pruned the map sends the others to -1, and their weights are 0, be the router cut or not; see `pruned`.

    For the reader alone, where they are known: `similarity` [E] of each expert to the dominant one of its group, None
    where that is not finite, and `counts` int [E], the picks of each expert in the calibration data.

    Raises:
        ValueError: they do not fit together.
    """

    expert_map: list[int]
    dominant: list[int]
    weights: list[float]
    similarity: list[float | None] | None = field(default=None, compare=False)
    counts: list[int] | None = field(default=None, compare=False)
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("expert_map", "dominant", "weights", "similarity", "counts"):
            _check_numbers(name, vars(self)[name], least=-1 if name == "expert_map" and self.kept else None)
        if self.kept is None or -1 not in self.expert_map:
            self._check_groups()
        if self.kept is not None and self.kept != self.dominant:
            raise ValueError(f"kept={self.kept} must be the dominant experts, {self.dominant}.")
        self._check_lengths()

    def _check_groups(self) -> None:
        numbers = list(range(len(self.dominant)))
        known = all(expert in range(len(self.expert_map)) for expert in self.dominant)
        groups = [self.expert_map[expert] for expert in self.dominant] if known else None
        if sorted(set(self.expert_map)) != numbers or groups != numbers:
            raise ValueError(
                f"expert_map={self.expert_map} must send experts to the groups 0 to {len(numbers) - 1}, and each of "
                f"dominant={self.dominant} to its own."
            )

    def _check_lengths(self) -> None:
        for name in ("weights", "similarity", "counts"):
            values = vars(self)[name]
            if values is not None and len(values) != len(self.expert_map):
                raise ValueError(f"{name}={values} must have one entry for each of {len(self.expert_map)} experts.")
        sums = [sum(self.weights[member] for member in self.members(group)) for group in range(len(self.dominant))]
        if not all(abs(total - 1) < 1e-3 for total in sums):
            raise ValueError(f"weights={self.weights} must sum to 1 in each group, not to {sums}.")

    @classmethod
    def pruned(cls, num_experts: int, kept: list[int], counts: list[int] | None = None) -> "LayerPlan":
        """Return the plan of a layer of which the experts `kept` stay, rising, and the router is cut to these.

        Raises:
            ValueError: they are no such experts.
        """
        known = type(num_experts) is int and type(kept) is list and all(type(expert) is int for expert in kept)
        if not known or not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < num_experts:
            raise ValueError(f"kept={kept!r} must be a rising list of some of num_experts={num_experts!r} experts.")
        places = {expert: place for place, expert in enumerate(kept)}
        expert_map = [places.get(expert, -1) for expert in range(num_experts)]
        return cls(expert_map, list(kept), [float(place >= 0) for place in expert_map], None, counts, list(kept))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerPlan":
        """Return what `to_dict` gave.

        Raises:
            ValueError, TypeError: the values are those of no plan.
        """
        return cls.pruned(**values) if "num_experts" in values else cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values; that of a layer to be pruned is what the checkpoint says, and the counts."""
        if self.kept is None or not (self.is_whole or -1 in self.expert_map):
            values = asdict(self)
        else:
            values = {"num_experts": len(self.expert_map), "kept": self.kept, "counts": self.counts}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def is_whole(self) -> bool:
        """Whether the layer keeps all its experts."""
        return len(self.dominant) == len(self.expert_map)

    @property
    def stored_map(self) -> list[int]:
        """The map as the result's router has it: where that is cut, it sends experts without a row to -1."""
        if self.kept is None:
            return self.expert_map
        return [self.kept.index(expert) if expert in self.kept else -1 for expert in range(len(self.expert_map))]

    def members(self, group: int) -> list[int]:
        """Return the experts of a group."""
        return [expert for expert, target in enumerate(self.expert_map) if target == group]


# Per list of a layer's plan: the kind of its numbers, and the least.
NUMBERS: dict[str, tuple[type, float]] = {
    "expert_map": (int, 0),
    "dominant": (int, -math.inf),  # that they are experts is judged with the map
    "weights": (float, 0),
    "similarity": (float, -math.inf),
    "counts": (int, 0),
}


def _check_numbers(name: str, values: Any, least: float | None = None) -> None:
    """Raise ValueError where a list of a layer's plan holds what is no number, or none that it can hold."""
    if values is None and name in ("similarity", "counts"):
        return
    kind, usual = NUMBERS[name]
    least = usual if least is None else least
    kinds = (int,) if kind is int else (int, float)
    known: list[Any] = (
        [value for value in values if value is not None or name != "similarity"] if type(values) is list else [None]
    )
    if not all(type(value) in kinds and math.isfinite(value) and value >= least for value in known):
        words = f"{'whole ' if kind is int else ''}numbers{'' if least else ' from 0 on'}"
        raise ValueError(f"{name}={values!r} must be a list of {words}.")


@dataclass(frozen=True)
class MergePlan:
    """Plans per layer name, and where they come from: model, statistics, versions and options.

    `alignment` and `merging` are the methods themselves where they were given as callables; a saved plan has only
    their names.
    """

    layers: dict[str, LayerPlan]
    provenance: dict[str, Any]
    alignment: Callable | None = field(default=None, compare=False, repr=False)
    merging: Callable | None = field(default=None, compare=False, repr=False)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model that the plan was made for."""
        return self.provenance["fingerprint"]

    @property
    def config(self) -> dict[str, Any]:
        """The options, as `MergeConfig.to_dict` wrote them."""
        return self.provenance["config"]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **self.provenance, "layers": layers}

    def to_json(self) -> str:
        """Return the plan as JSON text, a line per list."""
        return json_text(self.to_dict()) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "MergePlan":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no plan, or of a later format.
        """
        content = read_json(path, "make one with plan_merge")
        try:
            if content.pop("format") != FORMAT or content.pop("format_version") > FORMAT_VERSION:
                raise ValueError("its format is none that this version reads")
            layers = {name: LayerPlan.from_dict(layer) for name, layer in content.pop("layers").items()}
            _check_provenance(content, list(layers))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"{path} is no merge plan, or not a whole one ({damage(error)})"
            raise ValueError(f"{told}; delete it and make one with plan_merge.") from None
        return cls(layers, content)


def _check_provenance(content: dict[str, Any], layer_names: list[str]) -> None:
    """Raise ValueError, KeyError or TypeError where a plan does not say, or wrongly, where it comes from."""
    for name in ("model", "model_type", "fingerprint"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name}={content[name]!r} must be text")
    if not layer_names:
        raise ValueError("it has no layers")
    tokens, config = content["tokens"], {"selection": "salient", **content["config"]}  # older ones had no other
    _check_numbers("counts", [tokens[name] for name in layer_names])
    # The name of a callable is of no method, and is judged where the plan is used.
    own = {stage: config.pop(stage) for stage in REGISTRIES if "." in config[stage]}
    MergeConfig(**config | {"skip": tuple(config["skip"])})
    if not all(isinstance(name, str) for name in own.values()):
        raise ValueError(f"config={own} must name methods")


def provenance(layers: Layers, tokens: dict[str, int], config: MergeConfig) -> dict[str, Any]:
    """Return where a plan comes from, as JSON values.

    Args:
        tokens: that the plan was made from, by the layer's name.
    """
    model = layers.model
    return {
        "model": public_name(model.name_or_path),
        "model_type": family_of(type(model.config))[0],
        "fingerprint": layers.fingerprint,
        "tokens": tokens,
        "versions": {package: version(package) for package in ("hf_mcsmoe", "transformers", "torch")},
        "config": config.to_dict(),
    }
