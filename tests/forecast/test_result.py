"""Bytes of results from shapes alone, against the files that are then written."""

from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import batches

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, compress, moe_layers
from hf_mcsmoe.evaluation.costs import bytes_on_disk
from hf_mcsmoe.forecast.result import expected_counts, result_by_hand
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model
from hf_mcsmoe.layers.stored import FILES, stored_bytes
from hf_mcsmoe.search.choices import HEADER, MORE

OPTIONS: dict[str, dict[str, Any]] = {
    "merge": {"config": MergeConfig(experts=4)},
    "share": {"config": MergeConfig(experts=0.5, budget="uniform")},
    "bits": {"config": MergeConfig(experts=4), "quantization": QuantizationConfig(bits=4)},
    "prune": {"config": MergeConfig(experts=4, reduce="prune")},
    "constants": {"config": MergeConfig(experts=4, reduce="prune", pruned_router="constant")},
}
# Together the layouts: gated, fused beside shared experts, transposed with biases, a class of their own.
CASES = [
    ("qwen3_moe", "merge"),
    ("mixtral", "prune"),
    ("mixtral", "constants"),
    ("deepseek_v3", "bits"),
    ("gpt_oss", "share"),
    ("switch_transformers", "merge"),
]
# Tensors of a layer that the result may have more of, for so many experts: plain ones are named one by one.
MORE_TENSORS = {
    "prune": lambda experts: 3 * experts,
    "constants": lambda experts: 3 * experts + 1,
    "bits": lambda _: MORE,
}


def _header(folder: Path) -> int:
    """Return the bytes of the headers of a folder's weight files, each of which begins with the length of its own."""
    starts = [file.read_bytes()[:8] for file in folder.glob("*.safetensors")]
    return sum(8 + int.from_bytes(start, "little") for start in starts)


@pytest.mark.parametrize(("name", "way"), CASES)
@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_bytes_are_those_of_the_files(name: str, way: str, tmp_path: Path) -> None:
    model, options = build(name), OPTIONS[way]
    model.save_pretrained(tmp_path / "model")
    known = stored_bytes(str(tmp_path / "model"))
    assert known is not None
    assert (known.bytes, known.known_by) == (bytes_on_disk(tmp_path / "model"), FILES)
    told = result_by_hand(Layers.of(empty_model(str(tmp_path / "model"))), **options)
    result = compress(model, batches(name, model), **options)
    result.save_pretrained(tmp_path / "result")
    written = bytes_on_disk(tmp_path / "result")
    more = MORE_TENSORS.get(way, lambda experts: 0)
    names = len(model.state_dict()) + sum(more(choice.experts) for choice in told.choices.values())
    # Headers weigh much in models of a few hundred kilobytes, and are counted as the longest there are.
    assert told.bytes - HEADER * names == pytest.approx(written - _header(tmp_path / "result"), rel=0.02)
    if way not in ("bits", "prune"):  # whose parameters are words, or whose routers lost rows
        assert told.parameters == result.num_parameters()
    stored = {layer.original_name: layer.num_experts for layer in moe_layers(result)}
    assert sum(stored.values()) == sum(told.choices[name].experts for name in stored if name in told.choices)


def test_low_rank_is_smaller_than_dense(tmp_path: Path) -> None:
    layers = Layers.of(build("mixtral"))
    dense = result_by_hand(layers, MergeConfig(experts=4))
    low = result_by_hand(layers, MergeConfig(experts=4), low_rank=LoSparseConfig(rank=2, keep=0.1))
    assert low.bytes < dense.bytes
    assert low.parameters == dense.parameters


def test_skipped_layers_and_few_picks_are_counted() -> None:
    layers = Layers.of(build("qwen3_moe"))
    config = MergeConfig(experts=1, skip=(layers[0].name,))
    counts = expected_counts(layers, config)
    assert counts == dict.fromkeys(layers.names[1:], 1)
    told, first = result_by_hand(layers, config), layers[0]
    one = first.num_parameters // first.num_experts
    whole = result_by_hand(layers, MergeConfig(experts=1.0))
    idle = len(counts) * (min(first.top_k or 1, first.num_experts) - 1) * one
    assert whole.active - told.active == idle
    assert whole.parameters - told.parameters == len(counts) * (first.num_experts - 1) * one
