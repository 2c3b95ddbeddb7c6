"""The merge plan: which experts of which layer become one, with which weights; readable JSON."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.collect import check_finite
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.files import damage, read_json, write_text
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.methods.budget import BUDGET, budget_total
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.methods.config import CONSTANT, REGISTRIES, SLICE, MergeConfig
from hf_mcsmoe.methods.grouping import Groups
from hf_mcsmoe.methods.pruning import SELECTION, keeping_order
from hf_mcsmoe.methods.registry import method_name
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.subsets import check_subsets
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.configuration_mcsmoe import config_class_for
from hf_mcsmoe.modeling.modeling_mcsmoe import merged_class
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.processes import current
from hf_mcsmoe.record import json_text, public_name

FORMAT = "mcsmoe-plan"
FORMAT_VERSION = 1
# Fewer calibration tokens per expert than this leave frequencies to chance.
FEW_TOKENS = 8


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


def plan_merge(
    model: PreTrainedModel | Layers, statistics: RoutingStatistics, config: MergeConfig | None = None
) -> MergePlan:
    """Decide which experts merge (paper, section 3.1): saliency, budget over the layers, groups, weights.

    Or, with `reduce="prune"`, which stay: the most salient of each layer, or of each of the groups of its router.

    Args:
        model: a model, or its layers where they are found already.

    Raises:
        ValueError: statistics of another model, with NaN or without a sum that a method needs, a pattern of `skip`
            that matches no layer, or more experts asked for than a layer has.
    """
    check_given(statistics=(statistics, RoutingStatistics), config=(config, (MergeConfig, NoneType)))
    config = (config or MergeConfig()).resolved()
    layers = Layers.of(model).uncompressed()
    check_whole(layers.model, "a plan")
    layers = check_request(layers, config)
    if statistics.fingerprint != layers.fingerprint:
        raise ValueError("The statistics were taken from another model; run collect_statistics on this one.")
    check_finite(statistics)
    statistics.check({layer.name: layer.sizes for layer in layers})
    _warn_if_few_tokens(layers, statistics)
    sums = [statistics.together([layer.name for layer in shared]) for shared in layers.tied]
    for layer in sums:
        layer.check(config.needs)
    plans = current().agreed(lambda: _decided(layers, sums, config))
    given = [method if callable(method) else None for method in (config.alignment, config.merging)]
    tokens = {name: int(layer.tokens) for name, layer in statistics.layers.items()}
    return MergePlan(plans, provenance(layers, tokens, config), *given)


def _decided(layers: Layers, sums: list[Sums], config: MergeConfig) -> dict[str, LayerPlan]:
    """Return the plan of each layer."""
    scores, salient = [], SALIENCY[cast(str, config.saliency)]
    for (first, *_), layer in zip(layers.tied, sums, strict=True):
        with first.view(layer, config.seed) as view:
            scores.append(salient(view))
    items = (_pruned if config.reduce == "prune" else _merged)(layers, sums, scores, config)
    return {layer.name: item for shared, item in zip(layers.tied, items, strict=True) for layer in shared}


def _merged(layers: Layers, sums: list[Sums], scores: list[torch.Tensor], config: MergeConfig) -> Iterator[LayerPlan]:
    """Yield for each set of experts how they merge."""
    chosen = {stage: registry[getattr(config, stage)] for stage, registry in REGISTRIES.items()}
    least = max(config.least(len(saliency)) for saliency in scores)
    if config.cuts_router:
        least = max(least, *(_limits(layers, shared)[0] for shared in layers.tied))
    counts = _counts(scores, config.experts, least, config)
    for shared, layer, saliency, count in zip(layers.tied, sums, scores, counts, strict=True):
        with shared[0].view(layer, config.seed, config.capacity) as view:
            similarity = chosen["similarity"](view)
            groups = chosen["grouping"](view, saliency, similarity, count)
            weights = chosen["weighting"](view, saliency, groups)
        kept = groups.dominant if config.cuts_router else None
        yield LayerPlan(groups.expert_map, groups.dominant, weights.tolist(), *_shown(groups, similarity, layer), kept)


def _pruned(layers: Layers, sums: list[Sums], scores: list[torch.Tensor], config: MergeConfig) -> Iterator[LayerPlan]:
    """Yield for each set of experts which of them stay: as many of each group of a router."""
    limits = [_limits(layers, shared) if config.cuts_router else (1, 1) for shared in layers.tied]
    orders = [keeping_order(saliency, groups) for saliency, (_, groups) in zip(scores, limits, strict=True)]
    units = [saliency[order].sum(1) for saliency, order in zip(scores, orders, strict=True)]
    least = max(max(-(-config.min_experts // groups), few // groups) for few, groups in limits)
    # Of a whole number of experts the groups share alike; see `check_request`.
    experts = config.experts // limits[0][1] if isinstance(config.experts, int) else config.experts
    numbers = _counts(units, experts, least, config)
    select = SELECTION[config.selection]
    for shared, layer, saliency, (_, groups), count in zip(layers.tied, sums, scores, limits, numbers, strict=True):
        with shared[0].view(layer, config.seed) as view:
            kept = select(view, saliency, count * groups, groups)
        counts = layer.counts.tolist() if "counts" in layer else None
        yield LayerPlan.pruned(len(saliency), kept, counts)


def _limits(layers: Layers, shared: list[MoELayer]) -> tuple[int, int]:
    """Return how few experts the routers of layers that share them can do with, and in how many groups."""
    found = [cut_limits(layers.model, layer.name) for layer in shared]
    return max(least for least, _ in found), max(groups for _, groups in found)


def _counts(saliency: list[torch.Tensor], experts: int | float, min_experts: int, config: MergeConfig) -> list[int]:
    counts: list[int] = BUDGET[config.budget](saliency, experts, min_experts)
    _check_counts(counts, [len(scores) for scores in saliency], method_name(config.budget))
    return counts


def _shown(groups: Groups, similarity: torch.Tensor, sums: Sums) -> tuple[list[float | None], list[int] | None]:
    """Return what the plan shows of a layer: similarity [E] of each expert to its dominant, and its picks [E]."""
    nearest = [similarity[expert, groups.dominant[group]] for expert, group in enumerate(groups.expert_map)]
    shown = [round(float(value), 4) if value.isfinite() else None for value in nearest]
    return shown, sums.counts.tolist() if "counts" in sums else None


def check_request(layers: Layers, config: MergeConfig) -> Layers:
    """Return the layers to merge after checking, before any forward, that `config` can be met.

    Raises:
        ValueError: see `Layers.selected`; more experts asked for than a layer has, or fewer than `min_experts` leaves;
            a model whose class or type a merged checkpoint could not name.
    """
    merged_class(type(layers.model))
    config_class_for(type(layers.model.config).model_type)
    layers = layers.selected(config.skip)
    for layer in layers:
        if isinstance(config.experts, int) and config.experts > layer.num_experts:
            raise ValueError(
                f"experts={config.experts} is more than the {layer.num_experts} experts of {layer.name}: ask for less."
            )
    if config.pruned_router != SLICE and config.reduce != "prune":
        raise ValueError(
            f"pruned_router={config.pruned_router!r} keeps the rows of experts that are pruned, and "
            f"reduce={config.reduce!r} is no pruning: choose reduce='prune', or leave it out."
        )
    if config.cuts_router:
        _check_pruning(layers, config)
    elif config.reduce == "prune":
        _check_constants(layers, config)
    total = budget_total(config.experts, [layer.num_experts for layer in layers])
    if config.min_experts * len(layers) > total or config.min_experts > min(layer.num_experts for layer in layers):
        raise ValueError(
            f"min_experts={config.min_experts} in {len(layers)} layers is more than the {total} experts to keep: "
            "lower it or raise `experts`."
        )
    if sum(config.least(layer.num_experts) for layer in layers) > total:
        raise ValueError(
            f"capacity={config.capacity} is too few for the {total} groups that all layers have together: raise it or "
            "`experts`."
        )
    return layers


def _check_pruning(layers: Layers, config: MergeConfig) -> None:
    """Raise ValueError where a router cannot be cut, or not to as few experts as are asked for."""
    limits = [_limits(layers, shared) for shared in layers.tied]
    sizes = [shared[0].num_experts for shared in layers.tied]
    least, groups = max(few for few, _ in limits), max(groups for _, groups in limits)
    if config.reduce != "prune" and groups > 1:
        raise ValueError(
            f"router={config.router!r} leaves a row for each group of experts, and these routers pick among {groups} "
            "groups of their own, which merged experts do not keep: choose router='map'."
        )
    if isinstance(config.experts, int) and config.experts % groups:
        raise ValueError(
            f"experts={config.experts} cannot be shared alike by the {groups} groups that the routers pick among: "
            f"keep a multiple of {groups}."
        )
    if config.selection == "exhaustive" and (scaled := next((x.name for x in layers if x.scales_inputs), None)):
        raise ValueError(
            f"selection='exhaustive' does not know routers that scale inputs, as that of {scaled} does: choose "
            "selection='salient'."
        )
    if config.selection == "exhaustive":  # or with as many in each layer
        for size in sizes:
            share = config.experts if isinstance(config.experts, int) else round(config.experts * size)
            check_subsets(size, max(share, 1), groups)
    if budget_total(config.experts, sizes) < least * len(sizes):
        raise ValueError(
            f"experts={config.experts} leaves less than the {least} experts a layer that the routers need at least: "
            "raise `experts`, or merge."
        )


def _check_constants(layers: Layers, config: MergeConfig) -> None:
    """Raise ValueError where constants cannot stand in the place of pruned experts."""
    if shared := next((tied for tied in layers.tied if len(tied) > 1), None):
        raise ValueError(
            f"{', '.join(layer.name for layer in shared)} share their experts, of which none can give way to a "
            f"constant (pruned_router={config.pruned_router!r}): choose pruned_router={SLICE!r}, or name them in "
            "`skip`."
        )


def saved_parameters(layers: Layers, config: MergeConfig) -> int:
    """Return how many parameters the merge removes, up to how the layers share the experts."""
    chosen = [tied[0] for tied in layers.selected(config.skip).tied]
    sizes = [layer.num_experts for layer in chosen]
    held = sum(layer.num_parameters for layer in chosen)
    gone = sum(sizes) - budget_total(config.experts, sizes)
    constants = gone * chosen[0].hidden_size if config.pruned_router == CONSTANT else 0
    return round(held * gone / sum(sizes)) - constants


def _check_counts(counts: list[int], sizes: list[int], name: str) -> None:
    """Raise ValueError where a budget's answer is not a number of experts, 1 to E, for each layer."""
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
    fits = whole and len(counts) == len(sizes)
    if not fits or not all(1 <= count <= size for count, size in zip(counts, sizes, strict=True)):
        raise ValueError(
            f"The budget {name} answered {counts!r}; it must return whole numbers of experts to keep, one for each of "
            f"the {len(sizes)} layers, from 1 to {sizes}."
        )


def _warn_if_few_tokens(layers: Layers, statistics: RoutingStatistics) -> None:
    few = [layer.name for layer in layers if statistics[layer.name].tokens < FEW_TOKENS * layer.num_experts]
    if few:
        seen = min(int(statistics[name].tokens) for name in few)
        warnings.warn(
            f"Few calibration tokens ({seen}) in {', '.join(few)}: groups rest on chance; calibrate on more text.",
            stacklevel=3,
        )


def provenance(layers: Layers, tokens: dict[str, int], config: MergeConfig) -> dict[str, Any]:
    """Return where a plan comes from, as JSON values.

    Args:
        tokens: that the plan was made from, by the layer's name.
    """
    model = layers.model
    return {
        "model": public_name(model.name_or_path),
        "model_type": model.config.model_type,
        "fingerprint": layers.fingerprint,
        "tokens": tokens,
        "versions": {package: version(package) for package in ("hf_mcsmoe", "transformers", "torch")},
        "config": config.to_dict(),
    }
