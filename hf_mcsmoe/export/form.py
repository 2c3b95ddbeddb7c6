"""The plain form of a compressed model: its family's own class, and which stored expert stands in which place."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_mcsmoe.export.engines import Shape, nearest_count
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.source import InMemory
from hf_mcsmoe.modeling.configuration_mcsmoe import family_of
from hf_mcsmoe.modeling.plain_mcsmoe import empty_plain
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.modeling.router_mcsmoe import router_beside


@dataclass(frozen=True)
class Slots:
    """Where the experts of one layer go: from `layer`, as it is stored, to `plain`, that of the family's class.

    `stored` says for each place which stored expert stands there, int [G]; `rows` which rows of the layer's router
    become one row, that of the place.
    """

    layer: MoELayer
    plain: MoELayer
    stored: list[int]
    rows: list[list[int]]

    @property
    def is_combined(self) -> bool:
        """Whether the plain router has fewer rows than the layer's."""
        return len(self.rows) < self.layer.num_routed


@dataclass(frozen=True)
class PlainForm:
    """A compressed model and the empty model, on the meta device, of the family's own class that it becomes."""

    layers: Layers
    plain: PreTrainedModel
    slots: list[Slots]

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model."""
        return self.layers.model

    @property
    def num_experts(self) -> int:
        """Experts of each layer of the plain model."""
        return len(self.slots[0].stored)


def shape_of(layers: Layers, num_experts: int) -> Shape:
    """Return what engines look at of a plain checkpoint of some layers with so many experts."""
    first = layers[0]
    return Shape(num_experts, first.top_k or 1, router_groups(first), first.intermediate_size)


def router_groups(layer: MoELayer) -> int:
    """Return the number of groups of experts that a layer's router picks among."""
    return _limits(layer)[1]


def least_experts(layer: MoELayer) -> int:
    """Return how few experts a layer's router can do with."""
    return _limits(layer)[0]


def _limits(layer: MoELayer) -> tuple[int, int]:
    """Return `cut_limits` of a layer; those of a router of fixed picks are none."""
    is_fixed = "tid2eid" in router_beside(layer.model, layer.name)._buffers
    return (1, 1) if is_fixed else cut_limits(layer.model, layer.name)


def check_family(layers: Layers) -> None:
    """Raise ValueError where a model is built on code beside its checkpoint, so that it is of no family."""
    if variant := family_of(type(layers.model.config))[1]:
        raise ValueError(
            f"{type(layers.model).__name__} is of the variant {variant!r}, which is no family of Transformers: "
            "there is no plain checkpoint of it, save it in our format."
        )


def plain_form_of(layers: Layers, *, expand: bool = False, engines: Sequence[str] = ()) -> PlainForm:
    """Return the plain form of a compressed model, found without weights.

    Args:
        expand: put every stored expert into all the places of the experts that it stands for, under the whole router.
        engines: those that are to run it, which what is advised goes by.

    Raises:
        ValueError: the model is not compressed, its layers have unlike numbers of experts, fewer than a token picks,
            or groups that its routers cannot pick among, or the family has no plain form for it.
    """
    _check_plain(layers, engines, expand=expand)
    before = layers[0].num_original if layers[0].kept else layers[0].num_routed
    places = [_places(layer, expand=expand) for layer in layers]
    plain = empty_plain(layers.model, before, len(places[0][0]))
    found = Layers.of(InMemory(plain))
    slots = [Slots(old, new, *place) for old, new, place in zip(layers, found, places, strict=True)]
    for slot in slots:
        if slot.plain.intermediate_size != slot.layer.intermediate_size:
            raise ValueError(
                f"{slot.layer.name} has experts of {slot.layer.intermediate_size} hidden units, and those of "
                f"{type(plain).__name__} have {slot.plain.intermediate_size} in all layers: leave units out of none."
            )
        if slot.plain.num_experts != len(slot.stored):
            raise ValueError(
                f"The configuration of {type(plain).__name__} does not say how many experts its layers have: "
                f"{slot.plain.name} of {len(slot.stored)} would have {slot.plain.num_experts}. The family has no "
                "plain form; save the model in our format."
            )
    return PlainForm(layers, plain, slots)


def _check_plain(layers: Layers, engines: Sequence[str], *, expand: bool) -> None:
    name = type(layers.model).__name__
    if not layers.compressed:
        raise ValueError(f"{name} is an ordinary model of its family already: there is nothing to export.")
    if constant := next((layer.name for layer in layers if layer.num_constants), None):
        raise ValueError(
            f"{constant} has constants in the place of pruned experts, which no model of the family's class knows: "
            "prune with pruned_router='slice' (--pruned-router slice) for a plain checkpoint."
        )
    if expand and (pruned := next((layer.name for layer in layers if layer.kept is not None), None)):
        raise ValueError(
            f"{pruned} is pruned, so that no stored expert stands for those that are gone: leave expand out."
        )
    counts = Counter(layer.num_routed if expand else layer.num_experts for layer in layers)
    if len(counts) > 1:
        told = ", ".join(f"{count} in {number}" for count, number in sorted(counts.items()))
        raise ValueError(
            f"A plain checkpoint has one number of experts for all of its layers, and {name} has {told}: compress "
            f"with budget='uniform' and experts={nearest_uniform(layers, engines)}."
        )


def nearest_uniform(layers: Layers, engines: Sequence[str] = ()) -> int:
    """Return the one number of experts that is nearest to those of the layers, in bytes: their mean, rounded.

    Or the next one that is as many as a token picks, that the router's groups divide, and that all engines run.
    """
    mean = max(1, round(sum(layer.num_experts for layer in layers) / len(layers)))
    least = max(map(least_experts, layers))
    shape, most = shape_of(layers, mean), max(layer.num_original for layer in layers)
    near = (nearest_count(names, shape, least=least, most=most) for names in (engines, ()))
    return next((count for count in near if count is not None), mean)


def _places(layer: MoELayer, *, expand: bool) -> tuple[list[int], list[list[int]]]:
    """Return the stored expert of each place, and the router's rows that become one there."""
    routed = list(range(layer.num_routed))
    if layer.expert_map is None:
        return routed, [[row] for row in routed]
    if expand or layer.num_experts == layer.num_routed:
        return list(layer.expert_map), [[row] for row in routed]
    stored = _by_router_group(layer)
    return stored, [layer.members[group] for group in stored]


def _by_router_group(layer: MoELayer) -> list[int]:
    """Return the stored experts in the order of the groups that the layer's router picks among.

    Raises:
        ValueError: stored experts stand for experts of several of these, or unlike numbers of each; there are too few;
            or picks are fixed beforehand.
    """
    if "tid2eid" in router_beside(layer.model, layer.name)._buffers:
        raise ValueError(
            f"The router of {layer.name} sends each token of the vocabulary to fixed experts, for which a router of "
            "fewer rows has no place: export with expand, which keeps the whole router."
        )
    least, groups = cut_limits(layer.model, layer.name)
    if layer.num_experts < max(least, layer.top_k or 1):
        raise ValueError(
            f"{layer.name} has {layer.num_experts} experts, and its router needs {max(least, layer.top_k or 1)} at "
            "least: keep more, or export with expand, which keeps the whole router."
        )
    size = layer.num_routed // groups
    of = [{member // size for member in members} for members in layer.members]
    sizes = Counter(min(group) for group in of)
    if any(len(group) > 1 for group in of) or len(set(sizes.values())) > 1 or len(sizes) < groups:
        raise ValueError(
            f"The router of {layer.name} picks among {groups} groups of {size} experts, which its merged experts "
            "do not keep apart: compress with --plain, which merges within these groups, or export "
            "with expand, which keeps the whole router."
        )
    return sorted(range(layer.num_experts), key=lambda stored: (min(of[stored]), stored))
