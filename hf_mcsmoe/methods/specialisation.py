"""How specialised the experts of a layer are: by what the router says of a token, and by which tokens they get.

Measures of Krishnamurthy et al. (2302.14703, section on metrics), in nats: a sample's entropy over the experts (low:
the router is sure), the entropy of their use (high: all work), and what the expert tells of a label of the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.sparse.linalg import svds

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.similarity import cosines
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import Sums

# Of experts that fewer tokens reached, which tokens they share is chance.
FEW_TOKENS = 8
NEEDS = ("counts", "tokens", "gate_entropy", "co_activation")


@STATISTICS.register("gate_entropy", axes="")
def gate_entropy(routed: Routed) -> torch.Tensor:
    """Return the sum over tokens of the entropy of `softmax(logits)`, float64 [], in nats."""
    return torch.special.entr(routed.logits.double().softmax(-1)).sum()


@dataclass(frozen=True)
class Specialisation:
    """The measures of one layer, in nats.

    `routing` is the mean entropy of a token's gate, of at most `largest` = ln E; `use` that of the experts' picks;
    `pair` the two experts that the same tokens pick most, and the cosine of their picks, of those that `FEW_TOKENS`
    reached, None where no token picks two; `information` what a pick tells of the label, of at most `label`, the
    entropy of the labels by picks; both are None without labels.
    """

    routing: float
    use: float
    largest: float
    pair: tuple[int, int, float] | None
    information: float | None = None
    label: float | None = None


def entropy(counts: torch.Tensor) -> float:
    """Return the entropy of the distribution that counts [n] make, in nats; 0 of nothing."""
    return float(torch.special.entr(counts.double() / counts.sum().clamp(min=1)).sum())


def mutual_information(counts: torch.Tensor) -> float:
    """Return the mutual information of row and column of a table of counts [Y, E], in nats."""
    joint = entropy(counts.flatten())
    return max(0.0, entropy(counts.sum(0)) + entropy(counts.sum(1)) - joint)


def specialisation(sums: Sums, labelled: Sequence[torch.Tensor] = ()) -> Specialisation:
    """Return the measures of a layer.

    Args:
        sums: of all tokens, with those of `NEEDS`.
        labelled: the counts [E] of each label's tokens.

    Raises:
        ValueError: a sum that was not collected.
    """
    few = sums.counts < FEW_TOKENS
    together = cosines(sums["co_activation"].double()).fill_diagonal_(0)
    together = together.masked_fill(few[:, None] | few, 0)
    place = int(together.argmax())
    first, second = sorted(divmod(place, len(together)))
    value = float(together.flatten()[place])
    table = torch.stack(list(labelled)) if len(labelled) > 1 else None
    return Specialisation(
        routing=float(sums["gate_entropy"] / sums.tokens.clamp(min=1)),
        use=entropy(sums.counts),
        largest=float(torch.tensor(float(len(sums.counts))).log()),
        pair=(first, second, value) if value > 0 else None,
        information=None if table is None else mutual_information(table),
        label=None if table is None else entropy(table.sum(1)),
    )


def stable_rank(matrix: torch.Tensor) -> float:
    """Return `sum(s^2) / max(s^2)` of the singular values s of a matrix [n, m]; 0 of zeros."""
    values, least = matrix.double().cpu(), min(matrix.shape)
    total = float(values.square().sum())
    if total == 0 or least == 1:
        return float(total > 0)
    start = torch.randn(least, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = float(svds(values.numpy(), k=1, v0=start.numpy(), return_singular_vectors=False)[0])
    return total / largest**2


def stable_ranks(experts: Experts) -> dict[str, float]:
    """Return the mean stable rank over the experts of a layer of each matrix, by its role."""
    roles = [role for role in ("gate", "up", "down") if role in experts.tensors]
    numbers = range(len(experts))
    return {role: sum(stable_rank(experts.expert(e)[role]) for e in numbers) / len(numbers) for role in roles}
