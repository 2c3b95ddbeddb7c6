"""What is said of an engine whose greedy tokens part from those of Transformers."""

import runpy
from pathlib import Path

import pytest
import torch

GREEDY = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serving" / "greedy.py"))["Greedy"]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([2, 1, 0], "the same 3 greedy tokens"),
        ([2, 0, 0], "1 of 3 greedy tokens, then one whose logit is 3 below"),
        ([2, 2, 0], "1 of 3 greedy tokens, then one whose logit is 0.5 below"),
        ([2], "1 of 3 greedy tokens, then the end"),
    ],
)
def test_the_margin_is_that_of_the_token_that_the_engine_took(tokens: list[int], told: str) -> None:
    logits = torch.tensor([[0.0, 1, 2], [1, 4, 3.5], [5, 0, 0]])
    assert GREEDY([7], [2, 1, 0], logits, frozenset([9])).compare(tokens) == told
