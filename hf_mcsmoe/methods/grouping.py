"""Which experts of a layer become one: groups around dominant experts, and the controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from hf_mcsmoe.methods.budget import salient_first
from hf_mcsmoe.methods.registry import Registry
from hf_mcsmoe.methods.view import LayerView

GROUPING = Registry("grouping")
# Most experts of a group of pseudo-pruning, unless another number is given (REAM).
USUAL_CAPACITY = 16


@dataclass(frozen=True)
class Groups:
    """Groups of one layer: `expert_map` int [E] -> [G], and the dominant expert of each group, int [G]."""

    expert_map: list[int]
    dominant: list[int]


def grouped_within(
    grouping: Callable[..., Groups],
    parts: int,
    view: LayerView,
    saliency: torch.Tensor,
    similarity: torch.Tensor,
    groups: int,
) -> Groups:
    """Return groups that keep equal, consecutive parts of the experts apart, as many in each.

    Args:
        grouping: a method of this stage, which is asked for each part by itself.
        parts: how many parts there are, such as the groups that a router picks among; it divides `groups`.
    """
    size, found = len(saliency) // parts, Groups([], [])
    for first in range(0, len(saliency), size):
        own = slice(first, first + size)
        part = grouping(replace(view, num_experts=size), saliency[own], similarity[own, own], groups // parts)
        before = len(found.dominant)
        expert_map = [before + group for group in part.expert_map]
        dominant = [first + expert for expert in part.dominant]
        found = Groups(found.expert_map + expert_map, found.dominant + dominant)
    return found


def numbered(labels: Sequence[int], saliency: torch.Tensor) -> Groups:
    """Return the groups that labels say, numbered by the index of their dominant: each one's most salient expert.

    Args:
        labels: [E]; experts of equal labels are a group.
        saliency: [E]; a tie goes to the lower index.
    """
    first: dict[int, int] = {}
    for expert in salient_first(saliency):
        first.setdefault(labels[expert], expert)
    dominant = sorted(first.values())
    number = {labels[expert]: place for place, expert in enumerate(dominant)}
    return Groups([number[label] for label in labels], dominant)


@GROUPING.register("dominant", paper="2310.01334")
def dominant_groups(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Let each expert join the most similar of the `groups` most salient ones (M-SMoE, section 3.1).

    Where groups have a capacity, experts join in the order of their saliency, and none joins a full group (the
    authors' code).

    Args:
        saliency: [E].
        similarity: [E, E].
        groups: G. They are numbered by the index of their dominant expert; a tie joins the lower number.

    Raises:
        ValueError: the groups cannot hold all experts.
    """
    order = salient_first(saliency)
    dominant = sorted(order[:groups])
    nearness = similarity[:, dominant].clone()  # [E, G]
    nearness[dominant, torch.arange(groups)] = torch.inf
    if view.capacity is None:
        return Groups(nearness.argmax(1).tolist(), dominant)  # argmax takes the first of equals
    _check_capacity(view.capacity, groups, len(saliency))
    expert_map, room = [0] * len(saliency), torch.full((groups,), view.capacity)
    for expert in order:  # the dominant ones are the first
        joined = int(nearness[expert].masked_fill(room == 0, -torch.inf).argmax())
        expert_map[expert] = joined
        room[joined] -= 1
    return Groups(expert_map, dominant)


@GROUPING.register("pseudo_pruning", paper="2604.04356")
def pseudo_pruning(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Let the most salient expert take its most similar ones up to the capacity, then the next one, and so on (REAM).

    So few large groups form around the most salient experts, and most of the `groups` centroids stay alone. The
    capacity is 16 unless another is given, and no less than is needed to place all experts.

    Raises:
        ValueError: the groups cannot hold all experts.
    """
    number = len(saliency)
    capacity = max(USUAL_CAPACITY, -(-number // groups)) if view.capacity is None else view.capacity
    _check_capacity(capacity, groups, number)
    centroids = salient_first(saliency)[:groups]
    labels = {expert: expert for expert in centroids}
    for centroid in centroids:
        near = torch.argsort(similarity[centroid], descending=True, stable=True).tolist()
        free = [expert for expert in near if expert not in labels]
        labels |= dict.fromkeys(free[: capacity - 1], centroid)
    return numbered([labels[expert] for expert in range(number)], saliency)


@GROUPING.register("random", paper="2310.01334")
def random_groups(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Draw the groups at random, none of them empty: the control of the paper's ablation."""
    number = len(saliency)
    generator = torch.Generator().manual_seed(view.seed)
    drawn = torch.randint(groups, (number,), generator=generator)
    drawn[torch.randperm(number, generator=generator)[:groups]] = torch.arange(groups)
    return numbered(drawn.tolist(), saliency)


@GROUPING.register("all_non_dominant_to_one", paper="2310.01334")
def all_non_dominant_to_one(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Leave the `groups` - 1 most salient experts alone, and make one of all others (the authors' code)."""
    order = salient_first(saliency)
    labels = dict.fromkeys(order, order[groups - 1]) | {expert: expert for expert in order[:groups]}
    return numbered([labels[expert] for expert in range(len(order))], saliency)


@GROUPING.register("non_dominant_only", paper="2310.01334")
def non_dominant_only(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Leave the dominant experts alone, and merge only those that would have joined each (the authors' code).

    N dominant experts make up to 2 N groups: N is the largest for which these are at most `groups`. Where they are
    fewer, the most salient of the others stay alone as well.
    """
    order = salient_first(saliency)
    for alone in range(groups - 1, 0, -1):
        near = replace(view, capacity=None)
        joined = dominant_groups(near, saliency, similarity, alone)
        labels = [
            -1 - expert if expert in joined.dominant else group for expert, group in enumerate(joined.expert_map)
        ]
        if len(set(labels)) <= groups:
            break
    else:
        return all_non_dominant_to_one(view, saliency, similarity, groups)
    for expert in order[alone:]:
        if len(set(labels)) == groups:
            break
        labels[expert] = -1 - expert
    return numbered(labels, saliency)


def _check_capacity(capacity: int, groups: int, experts: int) -> None:
    if capacity * groups < experts:
        raise ValueError(
            f"capacity={capacity} lets {groups} groups hold {capacity * groups} of {experts} experts: raise it or "
            "`experts`."
        )
