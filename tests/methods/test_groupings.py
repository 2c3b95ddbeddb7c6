"""Every grouping by its name: what groups must be, planted groups, and each rule against plain loops."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import tensor, view_of

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.methods.clustering import affinities, cluster
from hf_mcsmoe.methods.grouping import GROUPING, Groups

# Groupings that follow the similarity alone; the others may part what belongs together.
CLUSTERINGS = ["hierarchical", "hierarchical_complete", "hierarchical_single", "spectral", "kmeans"]


def _case(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make saliency [E] and cosines [E, E] of random vectors."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(size, 5, generator=generator, dtype=torch.float64), dim=1)
    return torch.rand(size, generator=generator, dtype=torch.float64), rows @ rows.T


def _grouped(
    method: str, saliency: torch.Tensor, similarity: torch.Tensor, groups: int, capacity: int | None = None
) -> Groups:
    view = replace(view_of(num_experts=len(saliency), seed=3), capacity=capacity)
    return GROUPING[method](view, saliency, similarity, groups)


def _parts(found: Groups) -> set[frozenset[int]]:
    numbers = range(len(found.dominant))
    return {frozenset(e for e, group in enumerate(found.expert_map) if group == number) for number in numbers}


@pytest.mark.parametrize("method", list(GROUPING))
@pytest.mark.parametrize("size", [1, 2, 7])
def test_there_are_as_many_groups_as_asked_for_each_with_its_most_salient_member(method: str, size: int) -> None:
    for seed, groups in itertools.product(range(4), range(1, size + 1)):
        saliency, similarity = _case(size, seed)
        if seed == 2:
            similarity = torch.ones(size, size, dtype=torch.float64)  # all alike
        if seed == 3:
            similarity, saliency = -100 * similarity, torch.zeros(size)  # no cosines, all equally salient
        found = _grouped(method, saliency, similarity, groups)
        assert len(_parts(found)) == groups
        assert found.dominant == sorted(found.dominant)
        for number, dominant in enumerate(found.dominant):
            members = [expert for expert, group in enumerate(found.expert_map) if group == number]
            assert dominant == max(members, key=lambda expert: (float(saliency[expert]), -expert))
        assert _grouped(method, saliency, similarity, groups) == found


@pytest.mark.parametrize("method", [*CLUSTERINGS, "dominant"])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_planted_pairs_are_found(method: str, scale: float) -> None:
    pairs = [(0, 5), (1, 2), (3, 7), (4, 6)]
    similarity = torch.full((8, 8), 0.1, dtype=torch.float64)
    for one, other in pairs:
        similarity[one, other] = similarity[other, one] = 0.99
    saliency = tensor([8, 7, 1, 6, 5, 2, 3, 4])  # one of each pair among the first four
    found = _grouped(method, saliency, scale * similarity.fill_diagonal_(1), 4)
    assert _parts(found) == set(map(frozenset, pairs))
    assert found.dominant == [0, 1, 3, 4]


LINKAGES = {"hierarchical": lambda pairs: sum(pairs) / len(pairs), "hierarchical_complete": min}
LINKAGES["hierarchical_single"] = max


@pytest.mark.parametrize("method", LINKAGES)
def test_linkage_merges_the_most_similar_clusters_one_after_the_other(method: str) -> None:
    for seed, groups in itertools.product(range(6), (2, 4, 6)):
        saliency, similarity = _case(9, seed)
        clusters = [frozenset([expert]) for expert in range(9)]
        while len(clusters) > groups:
            one, other = max(
                itertools.combinations(clusters, 2),
                key=lambda two: LINKAGES[method]([float(similarity[i, j]) for i in two[0] for j in two[1]]),
            )
            clusters = [part for part in clusters if part not in (one, other)] + [one | other]
        assert _parts(_grouped(method, saliency, similarity, groups)) == set(clusters)


def _within(rows: torch.Tensor, labels: list[int]) -> float:
    parts = [rows[[place for place, label in enumerate(labels) if label == number]] for number in set(labels)]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


@pytest.mark.parametrize("seed", range(3))
def test_k_means_finds_the_best_of_all_partitions(seed: int) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    every = [list(labels) for labels in itertools.product(range(3), repeat=6) if set(labels) == {0, 1, 2}]
    best = min(_within(rows, labels) for labels in every)
    assert _within(rows, cluster(rows, 3, seed=0).tolist()) == pytest.approx(best)


def test_k_means_leaves_no_cluster_empty_where_rows_are_equal() -> None:
    rows = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]]
    for groups in range(1, 7):
        labels = cluster(rows, groups, seed=1)
        assert sorted(set(labels.tolist())) == list(range(groups))
    assert cluster(rows, 3, seed=1).unflatten(0, (3, 2)).unique(dim=1).shape == (3, 1)


def test_affinities_are_those_of_cosines_or_scaled() -> None:
    cosines = tensor([1, -1, 0, -1, 1, 0.5, 0, 0.5, 1]).view(3, 3)
    assert affinities(cosines).tolist() == [[1, 0, 0.5], [0, 1, 0.75], [0.5, 0.75, 1]]
    assert affinities(10 * cosines + 5).tolist() == [[1, 0, 2 / 3], [0, 1, 1], [2 / 3, 1, 1]]


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_no_group_of_dominant_experts_grows_beyond_its_capacity(capacity: int) -> None:
    for seed in range(8):
        saliency, similarity = _case(10, seed)
        found = _grouped("dominant", saliency, similarity, 5, capacity)
        order = sorted(range(10), key=lambda expert: -float(saliency[expert]))
        groups = {expert: [expert] for expert in order[:5]}
        for expert in order[5:]:
            free = [dominant for dominant in groups if len(groups[dominant]) < capacity]
            groups[max(free, key=lambda dominant: float(similarity[expert, dominant]))].append(expert)
        assert _parts(found) == set(map(frozenset, groups.values()))
        assert max(map(len, _parts(found))) <= capacity
    assert _grouped("dominant", saliency, similarity, 5, 10) == _grouped("dominant", saliency, similarity, 5)


@pytest.mark.parametrize("capacity", [None, 3, 4])
def test_pseudo_pruning_fills_the_groups_of_the_most_salient_first(capacity: int | None) -> None:
    for seed in range(8):
        saliency, similarity = _case(20, seed)
        found = _grouped("pseudo_pruning", saliency, similarity, 9, capacity)
        order = sorted(range(20), key=lambda expert: -float(saliency[expert]))
        groups, left = {expert: [expert] for expert in order[:9]}, set(order[9:])
        for centroid, members in groups.items():
            near = sorted(left, key=lambda expert: -float(similarity[centroid, expert]))
            members += near[: (capacity or 16) - 1]
            left -= set(members)
        assert _parts(found) == set(map(frozenset, groups.values()))


def test_non_dominant_experts_merge_among_themselves() -> None:
    similarity = torch.eye(6, dtype=torch.float64)
    similarity[2, 0] = similarity[4, 0] = similarity[3, 1] = similarity[5, 1] = 0.5
    saliency = tensor([9, 8, 1, 2, 3, 4])
    assert _parts(_grouped("non_dominant_only", saliency, similarity, 4)) == {
        frozenset(part) for part in ([0], [1], [2, 4], [3, 5])
    }
    # Two dominant experts make four groups, one makes two: of three the next salient stays alone.
    assert _parts(_grouped("non_dominant_only", saliency, similarity, 3)) == {
        frozenset(part) for part in ([0], [1], [2, 3, 4, 5])
    }
    assert _parts(_grouped("all_non_dominant_to_one", saliency, similarity, 3)) == {
        frozenset(part) for part in ([0], [1], [2, 3, 4, 5])
    }


def test_groups_at_random_differ_by_the_seed_alone() -> None:
    saliency, similarity = _case(12, 0)
    drawn = [
        GROUPING["random"](view_of(num_experts=12, seed=seed), saliency, similarity, 4).expert_map for seed in range(5)
    ]
    assert len(set(map(tuple, drawn))) == 5
    sizes = [len(part) for part in _parts(_grouped("random", saliency, similarity, 4))]
    assert sum(sizes) == 12


REFUSED = [
    ({"capacity": 0}, "capacity=0 must be at least 1"),
    ({"capacity": 2, "grouping": "spectral"}, "for the groupings dominant and pseudo_pruning, not for 'spectral'"),
    ({"capacity": 2.5}, "capacity=2.5 must be a whole number"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_a_capacity_that_does_nothing_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MergeConfig(**options)


@pytest.mark.parametrize("method", ["dominant", "pseudo_pruning"])
def test_groups_that_cannot_hold_all_experts_are_refused(method: str) -> None:
    saliency, similarity = _case(9, 0)
    with pytest.raises(ValueError, match="capacity=2 lets 4 groups hold 8 of 9 experts"):
        _grouped(method, saliency, similarity, 4, 2)
