"""Scores of weights inside experts, the patterns that they choose, and the sums that they read."""

from typing import Any

import pytest
import torch

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.sparsity import PATTERN, SCORE, kept_units
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView, Sums

E, T, D, F = 4, 40, 8, 12
SUMS = ("inputs_squared", "units_squared", "gated_inputs_squared", "gated_units_squared")


def _experts() -> Experts:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
    tensors = {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}
    return Experts(tensors, lambda gate, up: torch.nn.functional.silu(gate) * up)


def _routed(experts: Experts, gates: torch.Tensor, scale: torch.Tensor | None = None) -> Routed:
    """Route 40 tokens to two of the first three experts each; none reaches the last."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(T)])
    hidden = torch.randn(T, D, generator=generator)
    return Routed(torch.zeros(T, E), hidden, index, gates, E, lambda: experts, scale)


def _view(experts: Experts, routed: Routed) -> LayerView:
    return LayerView(Sums({name: STATISTICS.find(name).function(routed) for name in SUMS}), E, 0, lambda: experts)


def _gates() -> torch.Tensor:
    return torch.rand(T, 2, generator=torch.Generator().manual_seed(2)) + 0.1


@pytest.mark.parametrize("scaled", [False, True])
def test_sums_are_those_of_a_loop_over_tokens(scaled: bool) -> None:
    experts, gates = _experts(), _gates()
    scale = torch.rand(T, 2, generator=torch.Generator().manual_seed(3)) if scaled else None
    routed = _routed(experts, gates, scale)
    expected: dict[str, Any] = {name: torch.zeros(E, D if "input" in name else F).double() for name in SUMS}
    for token in range(T):
        for pick, expert in enumerate(routed.index[token].tolist()):
            x = routed.hidden[token] * (1 if scale is None else scale[token, pick])
            gate, up = (experts.tensors[role][expert] @ x for role in ("gate", "up"))
            h, g = gate * torch.sigmoid(gate) * up, gates[token, pick]
            for name, value in zip(SUMS, (x, h, g * x, g * h), strict=True):
                expected[name][expert] += value.double() ** 2
    for name in SUMS:
        torch.testing.assert_close(STATISTICS.find(name).function(routed), expected[name], rtol=1e-5, atol=1e-7)


def test_gates_of_one_give_wanda_bit_for_bit_and_others_do_not() -> None:
    experts = _experts()
    same, other = (_view(experts, _routed(experts, gates)) for gates in (torch.ones(T, 2), _gates()))
    for role, score in SCORE["wanda"](same, 0).items():
        assert torch.equal(SCORE["moe_pruner"](same, 0)[role], score)
        assert not torch.equal(SCORE["moe_pruner"](other, 0)[role], score)


def test_scores_are_sizes_times_norms_of_what_is_multiplied() -> None:
    experts = _experts()
    view = _view(experts, _routed(experts, _gates()))
    found = SCORE["moe_pruner"](view, 1)
    for role, name in {
        "gate": "gated_inputs_squared",
        "up": "gated_inputs_squared",
        "down": "gated_units_squared",
    }.items():
        weights = experts.tensors[role][1]
        for column in range(weights.shape[1]):
            norm = view.sums[name][1, column].sqrt().float()
            torch.testing.assert_close(found[role][:, column], weights[:, column].abs() * norm)


@pytest.mark.parametrize("score", ["wanda", "moe_pruner"])
def test_an_expert_that_no_token_reached_is_scored_by_magnitude(score: str) -> None:
    experts = _experts()
    view = _view(experts, _routed(experts, _gates()))
    for role, values in SCORE[score](view, E - 1).items():
        assert torch.equal(values, experts.tensors[role][E - 1].abs())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_exactly_so_many_of_each_row_go_and_they_are_the_lowest(share: float) -> None:
    scores = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    kept = PATTERN["unstructured"](scores, share)
    assert kept.sum(1).tolist() == [20 - round(share * 20)] * 5
    for row in range(5):
        assert scores[row][kept[row]].min() > scores[row][~kept[row]].max()
    assert PATTERN["unstructured"](torch.zeros(3, 20), share).sum() == 3 * (20 - round(share * 20))  # ties as well


def test_two_of_each_four_stay() -> None:
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    kept = PATTERN["2:4"](scores, 0.5)
    assert (kept.view(6, 3, 4).sum(2) == 2).all()
    groups, places = scores.view(18, 4), kept.view(18, 4)
    assert all(group[place].min() > group[~place].max() for group, place in zip(groups, places, strict=True))
    with pytest.raises(ValueError, match=r"cannot be had of 10 inputs with a sparsity of 0\.5; choose the pattern"):
        PATTERN["2:4"](torch.rand(2, 10), 0.5)


def test_hidden_units_of_the_highest_sums_stay() -> None:
    scores = {"gate": torch.zeros(4, 2), "up": torch.zeros(4, 2), "down": torch.zeros(2, 4)}
    scores["gate"][0] = 1.0  # 2 in all
    scores["up"][2, 1] = 3.0
    scores["down"][0, 3] = 2.5
    assert kept_units(scores, 2).tolist() == [2, 3]
    assert kept_units(scores, 3).tolist() == [0, 2, 3]
