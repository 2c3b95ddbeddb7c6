"""Groups by clustering: hierarchical, spectral and k-means. Each uses the similarity of all pairs of experts."""

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from hf_mcsmoe.methods.grouping import GROUPING, Groups, numbered
from hf_mcsmoe.methods.view import LayerView

# Starts of k-means, of which the best counts, and steps of each.
RESTARTS, STEPS = 10, 100


@GROUPING.register("hierarchical", paper="2410.08589")
def hierarchical(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Merge the two clusters of the largest mean similarity until `groups` are left (HC-SMoE)."""
    return _linked(saliency, similarity, groups, "average")


@GROUPING.register("hierarchical_complete", paper="2410.08589")
def hierarchical_complete(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Merge the two clusters whose least similar members are the most similar, until `groups` are left."""
    return _linked(saliency, similarity, groups, "complete")


@GROUPING.register("hierarchical_single", paper="2410.08589")
def hierarchical_single(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Merge the two clusters whose most similar members are the most similar, until `groups` are left."""
    return _linked(saliency, similarity, groups, "single")


@GROUPING.register("spectral", paper="2409.01483")
def spectral(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Cluster experts by the eigenvectors of the normalised Laplacian of their affinity (UNCURL).

    The affinity of two experts is `(1 + s) / 2` of a cosine s. Of I - D^-1/2 A D^-1/2 the eigenvectors [E, G] of the
    `groups` smallest eigenvalues are taken, their rows scaled to 1, and clustered by k-means.
    """
    affinity = affinities(similarity)
    scale = affinity.sum(1).clamp(min=torch.finfo(affinity.dtype).tiny).rsqrt()
    normalised = scale[:, None] * affinity * scale[None, :]
    vectors = torch.linalg.eigh(torch.eye(len(affinity), dtype=affinity.dtype) - normalised).eigenvectors[:, :groups]
    rows = torch.nn.functional.normalize(vectors, dim=1)
    return numbered(cluster(rows, groups, view.seed).tolist(), saliency)


@GROUPING.register("kmeans", paper="2506.23266")
def kmeans(view: LayerView, saliency: torch.Tensor, similarity: torch.Tensor, groups: int) -> Groups:
    """Cluster experts by k-means on the rows of the similarity: how alike each is to all others.

    So it works on any similarity; those of outputs, which Sub-MoE clusters, are never held all at once.
    """
    rows = affinities(similarity)
    return numbered(cluster(rows, groups, view.seed).tolist(), saliency)


def affinities(similarity: torch.Tensor) -> torch.Tensor:
    """Return a symmetric affinity in [0, 1], float64 [E, E], of a similarity [E, E].

    That is `(1 + s) / 2` of cosines; what lies outside [-1, 1] is scaled to between the smallest and the largest.
    """
    both = torch.nan_to_num(similarity.double().cpu())
    both = (both + both.T) / 2
    apart = both[~torch.eye(len(both), dtype=torch.bool)]
    low, high = (-1.0, 1.0) if not apart.numel() or apart.abs().max() <= 1 + 1e-6 else (apart.min(), apart.max())
    return ((both - low) / max(float(high - low), torch.finfo(both.dtype).tiny)).clamp(0, 1).fill_diagonal_(1)


def cluster(rows: torch.Tensor, groups: int, seed: int) -> torch.Tensor:
    """Return labels int [n] of exactly `groups` clusters of rows [n, m]: k-means++ and Lloyd's steps, the best start.

    No cluster stays empty: it takes the row that is farthest from its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    best, labels = float("inf"), torch.arange(len(rows))
    if groups == len(rows):
        return labels
    pairs = torch.cdist(rows, rows).square().fill_diagonal_(0)
    for _ in range(RESTARTS):
        found = _settled(rows, rows[_spread(pairs, groups, generator)])
        error = float((rows - _centres(rows, found, groups)[found]).square().sum())
        if error < best:
            best, labels = error, found
    return labels


def _spread(pairs: torch.Tensor, groups: int, generator: torch.Generator) -> torch.Tensor:
    """Return the rows int [G] that k-means starts at, each drawn by its squared distance [n, n] to those before."""
    chosen = [int(torch.randint(len(pairs), (1,), generator=generator))]
    distance = pairs[chosen[0]]
    for draw in torch.rand(groups - 1, generator=generator, dtype=pairs.dtype):
        total = distance.cumsum(0)
        place = int(torch.searchsorted(total, draw * total[-1], right=True))
        if total[-1] == 0 or place == len(pairs):  # the others are copies of those chosen
            place = next(row for row in range(len(pairs)) if row not in chosen)
        chosen.append(place)
        distance = torch.minimum(distance, pairs[place])
    return torch.tensor(chosen)


def _settled(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the labels int [n] at which Lloyd's steps from these centres [G, m] end."""
    labels = torch.full((len(rows),), -1)
    for _ in range(STEPS):
        found = _nearest(rows, centres)
        if torch.equal(found, labels):
            break
        labels = found
        centres = _centres(rows, labels, len(centres))
    return labels


def _nearest(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the number of the nearest centre of each row, int [n], so that every centre has one."""
    # |r - c|^2 but for |r|^2, which is the same for all centres.
    own, labels = (centres.square().sum(1) - 2 * rows @ centres.T).min(1)
    own = own + rows.square().sum(1)
    sizes = torch.bincount(labels, minlength=len(centres))
    for empty in (sizes == 0).nonzero().flatten().tolist():
        moved = int(own.masked_fill(sizes[labels] < 2, -torch.inf).argmax())
        sizes[labels[moved]] -= 1
        labels[moved], own[moved], sizes[empty] = empty, 0, 1
    return labels


def _centres(rows: torch.Tensor, labels: torch.Tensor, groups: int) -> torch.Tensor:
    sums = torch.zeros(groups, rows.shape[1], dtype=rows.dtype).index_add_(0, labels, rows)
    return sums / torch.bincount(labels, minlength=groups)[:, None]


def _linked(saliency: torch.Tensor, similarity: torch.Tensor, groups: int, method: str) -> Groups:
    """Return the groups that SciPy's linkage of distances `largest similarity - s` comes to."""
    both = torch.nan_to_num(similarity.double().cpu())
    both = (both + both.T) / 2
    labels = linked((both.max() - both).fill_diagonal_(0), groups, method)
    return numbered(labels, saliency)


def linked(distance: torch.Tensor, groups: int, method: str) -> list[int]:
    """Return labels [n] of the `groups` clusters that SciPy's linkage of distances [n, n] on the CPU comes to."""
    number = len(distance)
    members = {expert: [expert] for expert in range(number)}
    tree = linkage(squareform(distance.numpy(), checks=False), method) if groups < number else []
    for step, (one, other, *_) in enumerate(tree[: number - groups]):
        members[number + step] = members.pop(int(one)) + members.pop(int(other))
    labels = {expert: label for label, together in members.items() for expert in together}
    return [labels[expert] for expert in range(number)]
