"""The sums of one layer and the file they are kept in; no model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_mcsmoe import RoutingStatistics
from hf_mcsmoe.calibration.collect import counted_tokens
from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import Sums

E, K = 5, 3
BASIC = ("counts", "gate_sum", "logit_gram", "tokens")
Shard = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tokens(number: int, seed: int = 0) -> Shard:
    """Make router logits [T, E], picks [T, K], some of them no expert, and weights [T, K], some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, E, generator=generator)
    index = torch.rand(number, E + 2, generator=generator).topk(K).indices.clamp(max=E)
    weights = torch.rand(number, K, generator=generator)
    weights[::4, 0] = 0
    return logits, index, weights


def _no_experts() -> Experts:
    pytest.fail("the experts were opened")


def _routed(logits: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Routed:
    return Routed(logits, torch.zeros(len(logits), 2), index, weights, E, _no_experts)


def _layer(*shards: Shard, mask: torch.Tensor | None = None) -> Sums:
    layers = []
    for shard in shards:
        routed = counted_tokens(_routed(*shard), mask)
        layers.append(Sums({name: STATISTICS[name](routed) for name in BASIC}))
    total, *others = layers
    for other in others:
        total = total + other
    return total


def _statistics(fingerprint: str = "f", seed: int = 0) -> RoutingStatistics:
    return RoutingStatistics(fingerprint, {name: _layer(_tokens(9, seed)) for name in ("model.0.experts", "model.1")})


def _same(left: Sums, right: Sums) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.mark.parametrize("masked", [False, True])
def test_sums_equal_a_loop_over_the_tokens(masked: bool) -> None:
    logits, index, weights = _tokens(40)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    counts, gates, gram, tokens = [0] * E, [0.0] * E, [[0.0] * E for _ in range(E)], 0
    for token in range(40):
        if mask is not None and not mask[token]:
            continue
        tokens += 1
        row = logits[token].tolist()
        for i in range(E):
            for j in range(E):
                gram[i][j] += row[i] * row[j]
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            if expert < E and weight != 0:
                counts[expert] += 1
                gates[expert] += weight
    layer = _layer((logits, index, weights), mask=mask)
    assert layer.counts.tolist() == counts
    assert layer.tokens.item() == tokens
    torch.testing.assert_close(layer["gate_sum"], torch.tensor(gates, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer["logit_gram"], torch.tensor(gram, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert layer.frequency.tolist() == pytest.approx([count / tokens for count in counts])


@pytest.mark.parametrize("cut", [1, 17, 39])
def test_shards_add_up_to_the_whole(cut: int) -> None:
    whole = _tokens(40)
    first, second = tuple(part[:cut] for part in whole), tuple(part[cut:] for part in whole)
    for split in (_layer(first, second), _layer(first) + _layer(second)):
        torch.testing.assert_close(dict(split), dict(_layer(whole)), rtol=1e-12, atol=1e-12)


def test_low_precision_logits_are_summed_in_double_precision() -> None:
    logits = torch.full((4097, E), 1.0, dtype=torch.bfloat16)
    layer = _layer((logits, torch.zeros(4097, 1, dtype=torch.long), torch.full((4097, 1), 1 / 3).bfloat16()))
    assert layer["logit_gram"].unique().tolist() == [4097]
    assert layer["gate_sum"][0] == 4097 * torch.tensor(1 / 3).bfloat16().double()


def test_no_token_leaves_zeros_and_no_division() -> None:
    layer = _layer(_tokens(0))
    assert layer.frequency.tolist() == [0] * E
    assert layer.tokens == 0


def test_an_added_layer_leaves_both_summands_alone() -> None:
    left, right = _layer(_tokens(5)), _layer(_tokens(5, seed=1))
    total = left + right
    for value in total.values():
        value.zero_()
    assert _same(left, _layer(_tokens(5)))
    assert _same(right, _layer(_tokens(5, seed=1)))


def test_a_saved_file_loads_as_it_was(tmp_path: Path) -> None:
    statistics = _statistics()
    statistics.save(tmp_path / "s.safetensors")
    loaded = RoutingStatistics.load(str(tmp_path / "s.safetensors"))
    assert loaded.fingerprint == "f"
    assert list(loaded.layers) == list(statistics.layers)
    assert all(_same(layer, loaded[name]) for name, layer in statistics.layers.items())
    assert {tensor.dtype for tensor in loaded["model.1"].values()} == {torch.float64, torch.int64}


def test_only_statistics_of_one_model_can_be_added() -> None:
    total = _statistics() + _statistics(seed=1)
    assert _same(total["model.1"], _layer(_tokens(9), _tokens(9, seed=1)))
    other_layers = RoutingStatistics("f", {"model.0.experts": _layer(_tokens(9))})
    for other in (_statistics("g"), other_layers):
        with pytest.raises(ValueError, match="come from different models"):
            _statistics() + other


def test_a_file_of_something_else_or_damaged_is_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    _statistics().save(good)
    content = good.read_bytes()
    damaged = {"cut": content[:-8], "header": content[:20], "text": b"counts: 1, 2, 3", "empty": b""}
    for name, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            pytest.fail(f"{name}: {RoutingStatistics.load(path)}")
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match="holds no routing statistics"):
            RoutingStatistics.load(path)


def test_a_file_without_one_of_the_sums_says_which_and_how_to_add_it(tmp_path: Path) -> None:
    metadata = {"format": "mcsmoe-statistics", "fingerprint": "f", "layers": '["model.1"]'}
    save_file({"model.1/counts": torch.ones(2)}, tmp_path / "s", metadata)
    loaded = RoutingStatistics.load(tmp_path / "s")
    assert loaded["model.1"].counts.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"'gate_sum' was not collected \(there are: counts\): .*needs=\['gate_sum'"):
        loaded["model.1"]["gate_sum"]


def test_a_file_of_other_layers_than_it_says_is_damaged(tmp_path: Path) -> None:
    metadata = {"format": "mcsmoe-statistics", "fingerprint": "f", "layers": '["model.1"]'}
    save_file({"model.2/counts": torch.ones(2)}, tmp_path / "s", metadata)
    with pytest.raises(ValueError, match="is damaged"):
        RoutingStatistics.load(tmp_path / "s")


def test_only_shards_of_the_same_sums_can_be_added() -> None:
    layer, tokens = _layer(_tokens(9)), Sums({"tokens": torch.tensor(9)})
    with pytest.raises(ValueError, match="Only statistics of the same names can be added"):
        layer + tokens


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    _statistics().save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["format_version"] == "1"
    for version, message in (("2", "has format 2; this version reads up to 1"), ("x", "has format x")):
        save_file(tensors, tmp_path / "later", metadata | {"format_version": version})
        with pytest.raises(ValueError, match=message):
            RoutingStatistics.load(tmp_path / "later")


def test_tokens_over_capacity_count_nowhere_and_skipped_ones_as_tokens() -> None:
    logits, index, weights = _tokens(12)
    index, weights = index[:, :1], weights[:, :1]
    dropped, skipped = torch.arange(12) % 3 == 0, torch.arange(12) % 3 == 1
    index[dropped], weights[dropped | skipped] = E, 0
    index[skipped] = 0
    layer, rest = _layer((logits, index, weights)), _layer((logits[~dropped], index[~dropped], weights[~dropped]))
    assert layer.tokens == 8
    assert layer.counts.sum() <= 4
    assert layer["gate_sum"].sum() > 0
    assert _same(layer, rest)


def _sums(**changed: torch.Tensor) -> Sums:
    """Return the sums of 4 experts over 6 tokens of which each reached 2, with some of them changed."""
    counts = torch.tensor([6, 3, 2, 1])
    gram = torch.eye(4, dtype=torch.float64)
    return Sums({"counts": counts, "logit_gram": gram, "tokens": torch.tensor(6), **changed})


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "negative counts": ({"counts": torch.tensor([6, -3, 2, 1])}, "counts of a holds -3.0, and is never negative"),
    "negative tokens": ({"tokens": torch.tensor(-6)}, "tokens of a holds -6.0"),
    "negative gates": ({"gate_sum": torch.tensor([1.0, -1, 0, 0]).double()}, "gate_sum of a holds -1.0"),
    "NaN": ({"logit_gram": torch.full((4, 4), torch.nan).double()}, "logit_gram of a is not finite"),
    "more than all": ({"tokens": torch.tensor(5)}, "6 tokens reached an expert, of 5 in all"),
    "too short": ({"logit_gram": torch.eye(3).double()}, r"logit_gram of a has the shape \(3, 3\)"),
    "too flat": ({"logit_gram": torch.ones(4).double()}, r"should be \[E, E\] of {'E': 4}"),
    "a scalar": ({"counts": torch.tensor(3)}, "counts of a has the shape"),
    "half precision": ({"logit_gram": torch.eye(4).half()}, "is of torch.float16, in which nothing is summed"),
    "a truth": ({"tokens": torch.tensor(True)}, "is of torch.bool"),
    "an unknown name": ({"nothing": torch.ones(4)}, "Unknown statistic method 'nothing'"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_sums_that_are_impossible_are_refused(case: str, tmp_path: Path) -> None:
    changed, message = IMPOSSIBLE[case]
    good = RoutingStatistics("print", {"a": _sums()})
    good.save(tmp_path / "good")
    assert RoutingStatistics.load(tmp_path / "good").layers.keys() == {"a"}
    RoutingStatistics("print", {"a": _sums(**changed)}).save(tmp_path / "bad")
    with pytest.raises(ValueError, match=message) as error:
        RoutingStatistics.load(tmp_path / "bad")
    assert "delete it and collect the statistics anew" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fingerprint", None), *(("layers", value) for value in (None, "5", "null", "[1", '{"a": 1}'))],
)
def test_a_file_without_its_metadata_is_refused(name: str, value: str | None, tmp_path: Path) -> None:
    metadata = {"format": "mcsmoe-statistics", "format_version": "1", "fingerprint": "print", "layers": '["a"]'}
    metadata = {key: text for key, text in (metadata | {name: value}).items() if text is not None}
    tensors = {f"b/{key}": tensor for key, tensor in _sums().items()}
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match=r"is damaged .* collect the statistics anew"):
        RoutingStatistics.load(tmp_path / "bad")


def test_sums_of_other_sizes_than_the_layer_are_refused() -> None:
    statistics = RoutingStatistics("print", {"a": _sums()})
    statistics.check({"a": {"E": 4, "D": 8}})
    with pytest.raises(ValueError, match=r"counts of a has the shape \(4,\), and should be \[E\] of {'E': 8, 'D': 8}"):
        statistics.check({"a": {"E": 8, "D": 8}})
