"""A sample of a layer's tokens: what is read back is what was seen, and its rule knows of no order."""

import pytest
import torch

from hf_mcsmoe import RoutingStatistics
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.sample import TOKENS, lowest, sample
from hf_mcsmoe.methods.view import LayerView, Sums

E, K, D, W = 5, 3, 4, 7  # a router with more logits than experts


def _experts() -> Experts:
    return Experts({"up": torch.ones(E, 2, D), "down": torch.ones(E, D, 2)}, lambda _, up: up)


def _routed(number: int, seed: int = 0, scaled: bool = False) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(number, width, generator=generator) for width in (W, D)]
    index = torch.rand(number, E + 1, generator=generator).topk(K).indices
    weights, scale = torch.rand(2, number, K, generator=generator)
    return Routed(*values, index, weights, E, _experts, scale if scaled else None)


def _view(table: torch.Tensor) -> LayerView:
    return LayerView(Sums(sample=table), E, 0, _experts)


def _rows(table: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in table.tolist()}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_few_tokens_are_all_kept_as_they_were(scaled: bool) -> None:
    routed = _routed(20, scaled=scaled)
    found = _view(sample(routed)).sample
    order = [int((routed.hidden == row).all(1).nonzero()) for row in found.hidden]
    assert sorted(order) == list(range(20))
    for name in ("logits", "hidden", "index", "weights", "scale"):
        there = getattr(routed, name)
        assert there is None if getattr(found, name) is None else torch.equal(getattr(found, name), there[order])
    outputs, weights = found.outputs_of(0)
    assert outputs.shape == (len(weights), D), "the experts are those of the view"


def test_shards_in_any_order_give_the_sample_of_all_and_equal_tokens_stay_once() -> None:
    tokens = _routed(3000)
    whole = sample(tokens)
    shards = [sample(tokens.where(torch.arange(3000) % 3 == part)) for part in (2, 0, 1)]
    parts = Sums(sample=shards[0]) + Sums(sample=shards[1]) + Sums(sample=shards[2])
    assert torch.equal(parts["sample"], whole)
    assert torch.equal(lowest(whole, whole), whole)
    assert len(whole) == TOKENS == len(_rows(whole))


def test_every_token_has_the_same_chance() -> None:
    # Of 4,000 tokens in two halves that differ in size by a thousand times, and of positions early and late.
    tokens = _routed(4000, seed=3)
    tokens.hidden[:2000] *= 1000
    kept = _view(sample(tokens)).sample.hidden
    assert 512 - 90 < int((kept.abs().max(1).values > 20).sum()) < 512 + 90  # four standard deviations
    late = (tokens.hidden[None, 1000:2000] == kept[:, None]).all(-1).any(1).sum()
    assert 256 - 70 < int(late) < 256 + 70


@pytest.mark.parametrize("table", [torch.zeros(0, 20), torch.zeros(3, 20), torch.full((3, 20), 9.0)])
def test_an_empty_or_damaged_sample_is_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="calibrate anew"):
        assert _view(table).sample


def test_a_file_of_statistics_holds_it(tmp_path: object) -> None:
    path = f"{tmp_path}/scores.safetensors"
    table = sample(_routed(9))
    RoutingStatistics("f", {"a": Sums(sample=table, tokens=torch.tensor(9))}).save(path)
    assert torch.equal(RoutingStatistics.load(path)["a"]["sample"], table)
