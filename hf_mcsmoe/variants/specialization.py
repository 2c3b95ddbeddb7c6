"""Measures of how far experts specialise, a loss that makes them, and a gate that looks at the experts.

Source: Krishnamurthy, Watkins and Gaertner, Improving Expert Specialization in Mixture of Experts (2023,
arXiv 2302.14703). The sample-similarity loss is normalised by the number of pairs in both of its terms.
"""

import math

import torch
from torch import nn

from hf_mcsmoe.variants.remote_mcsmoe import check_counts


def sample_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return H_s, the mean entropy of the gate over samples, in nats; 0 where each sample has one expert.

    Args:
        probabilities: of the gate, [B, E].
    """
    return _entropy(probabilities).mean()


def utilization_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return H_u, the entropy of the experts' mean use, in nats; log E where all are used alike.

    Args:
        probabilities: of the gate, [B, E].
    """
    return _entropy(probabilities.mean(dim=0))


def mutual_information(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return I(E; Y) of experts and labels, in nats.

    Args:
        probabilities: of the gate, [B, E].
        labels: int [B].

    Raises:
        ValueError: not one label for each sample.
    """
    if labels.shape != probabilities.shape[:1]:
        raise ValueError(f"Needs a label for each of {len(probabilities)} samples, not labels {list(labels.shape)}.")
    classes, index = labels.unique(return_inverse=True)
    joint = probabilities.new_zeros(len(classes), probabilities.shape[1]).index_add(0, index, probabilities)
    joint = joint / len(labels)
    return _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint.flatten())


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def sample_similarity_loss(
    probabilities: torch.Tensor,
    samples: torch.Tensor,
    *,
    same: float = 1e-2,
    different: float = 1e-2,
    most: int = 256,
) -> torch.Tensor:
    """Return the loss that lets one expert have samples near to each other, and different experts distant ones.

    With D the distances of samples over the largest, p the gate, B samples and E experts:
    `same / (E B²) sum_e sum_ij p_ie p_je D_ij - different / ((E² - E) B²) sum_{e != f} sum_ij p_ie p_jf D_ij`.
    To be added to the loss of a model, for each layer, with `softmax` of its `router_logits` and the hidden states
    that the router reads.

    Args:
        probabilities: of the gate, [B, E], E >= 2.
        samples: what the gate is to tell apart, [B, ...].
        same: weight of the first term.
        different: weight of the second.
        most: so many samples at most, evenly spaced, are compared.

    Raises:
        ValueError: not one row of the gate for each sample, a single expert, or a weight that is negative or not
            finite, or `most` below 1.
    """
    _check_weights(same=same, different=different)
    check_counts(most=most)
    if len(probabilities) != len(samples) or probabilities.shape[-1] < 2:
        raise ValueError(
            f"Needs a row of two or more experts for each sample, not probabilities {list(probabilities.shape)} and "
            f"samples {list(samples.shape)}."
        )
    if len(samples) > most:
        chosen = torch.linspace(0, len(samples) - 1, most, device=samples.device).long()
        probabilities, samples = probabilities[chosen], samples[chosen]
    flat = samples.flatten(1).float()
    distances = torch.cdist(flat, flat)
    distances = (distances / distances.max().clamp_min(1e-12)).detach()
    pairs = probabilities.float().T @ distances @ probabilities.float() / len(samples) ** 2  # [E, E]
    experts, own = len(pairs), pairs.diagonal().sum()
    return same * own / experts - different * (pairs.sum() - own) / (experts * (experts - 1))


def _check_weights(**weights: float) -> None:
    """Raise ValueError where the weight of a loss, by its name, is negative or not finite."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, not {weight}.")


def importance_loss(probabilities: torch.Tensor, weight: float = 1e-2) -> torch.Tensor:
    """Return the squared coefficient of variation of the experts' use, over samples.

    Args:
        probabilities: of the gate, [B, E].

    Raises:
        ValueError: the weight is negative or not finite.
    """
    _check_weights(weight=weight)
    use = probabilities.sum(dim=0)
    return weight * (use.std(correction=0) / use.mean()) ** 2


class DenseMixture(nn.Module):
    """A classifier of E small networks of which all are computed, and a gate: plain, or attentive.

    The attentive gate compares a query made of its own hidden layer with a key made of each expert's, so that it knows
    what the experts make of a sample. All experts have to be computed first, which is why this serves no sparse model.
    """

    def __init__(
        self, inputs: int, classes: int, *, num_experts: int, hidden: int = 32, attentive: bool = False
    ) -> None:
        """Make the networks.

        Raises:
            ValueError: a size is below 1, or there are fewer than two experts.
        """
        super().__init__()
        if min(inputs, classes, hidden) < 1 or num_experts < 2:
            raise ValueError(
                f"Needs sizes from 1 and two or more experts, not inputs={inputs}, classes={classes}, "
                f"hidden={hidden}, num_experts={num_experts}."
            )
        self.hidden = nn.ModuleList(nn.Linear(inputs, hidden) for _ in range(num_experts))
        self.heads = nn.ModuleList(nn.Linear(hidden, classes) for _ in range(num_experts))
        self.gate_hidden, self.attentive = nn.Linear(inputs, hidden), attentive
        self.gate = nn.Linear(hidden, hidden if attentive else num_experts, bias=not attentive)
        self.keys = nn.Linear(hidden, hidden, bias=False) if attentive else None

    def forward(self, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities of classes [B, C] and probabilities of experts [B, E].

        Args:
            samples: [B, D].
        """
        hidden = torch.stack([layer(samples).relu() for layer in self.hidden], dim=1)  # [B, E, H]
        logits = torch.stack([head(hidden[:, expert]) for expert, head in enumerate(self.heads)], dim=1)
        query = self.gate(self.gate_hidden(samples).relu())
        if self.keys is not None:
            query = torch.einsum("bh,beh->be", query, self.keys(hidden)) / query.shape[-1] ** 0.5
        gates = query.softmax(dim=-1)
        return (gates[..., None] * logits).sum(dim=1).log_softmax(dim=-1), gates
