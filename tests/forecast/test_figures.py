"""Figures of published models from their configurations alone, against what their authors say of them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_mcsmoe.forecast.figures import Figures, figures_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_config
from hf_mcsmoe.layers.stored import BY_CONFIG, configured_bytes

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
G = 1e9


@dataclass(frozen=True)
class Published:
    """What authors say, as they write it: G parameters in all, and active per token; what the latter leave out."""

    total: str
    active: str
    layers: int
    shape: tuple[int, int]  # experts, top-k
    counts: str = "all"  # or "no input" embedding, or "no embeddings" at either end, in `active`


PUBLISHED = {
    # Model cards of Qwen/Qwen3-30B-A3B and Qwen/Qwen3-235B-A22B.
    "Qwen3-30B-A3B": Published("30.5", "3.3", 48, (128, 8)),
    "Qwen3-235B-A22B": Published("235", "22", 94, (128, 8)),
    # Announcement of Mixtral 8x7B by Mistral AI, December 2023; in arXiv 2401.04088 they are 47 and 13.
    "Mixtral-8x7B": Published("46.7", "12.9", 32, (8, 2)),
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3, of the main model.
    "DeepSeek-V3": Published("671", "36.7", 58, (256, 8), "no input"),
    # Model card of gpt-oss, arXiv 2508.10925, table 1, which counts the output embedding alone as active.
    "gpt-oss-120b": Published("116.83", "5.13", 36, (128, 4), "no input"),
    # OLMoE, arXiv 2409.02060.
    "OLMoE-1B-7B": Published("6.9", "1.3", 16, (64, 8)),
    # GLM-4.5, arXiv 2508.06471, table 1, without word embeddings and output layer.
    "GLM-4.5-Air": Published("106", "12", 45, (128, 8), "no embeddings"),
    # Switch Transformers, arXiv 2101.03961, table 7; active is the dense model of the same operations, T5-base.
    "Switch-base-32": Published("2.0", "0.223", 12, (32, 1)),
    "Switch-base-128": Published("7.4", "0.223", 12, (128, 1)),
}
EMBEDDINGS = {"all": 0, "no input": 1, "no embeddings": 2}


@functools.cache
def _figures(name: str) -> Figures:
    return figures_of(Layers.of(empty_model(str(CONFIGS / name), dequantize=True)))


def _near(published: str) -> object:
    """Return what a figure in G may be: within one percent, or a unit of the last digit that is told."""
    digits = len(published.partition(".")[2])
    return pytest.approx(float(published) * G, rel=0.01, abs=10.0**-digits * G)


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_those_that_authors_publish(name: str) -> None:
    found, said = _figures(name), PUBLISHED[name]
    assert (found.layers, (found.experts, found.top_k)) == (said.layers, said.shape)
    assert found.parameters == _near(said.total)
    assert found.active - EMBEDDINGS[said.counts] * found.embedding == _near(said.active)


def test_every_configuration_is_compared_with_something_published() -> None:
    assert {folder.name for folder in CONFIGS.iterdir()} == PUBLISHED.keys()


def test_shared_experts_are_counted_apart() -> None:
    shared = {name: _figures(name).shared for name in ("DeepSeek-V3", "GLM-4.5-Air", "Mixtral-8x7B")}
    assert shared == {"DeepSeek-V3": 58 * 3 * 7168 * 2048, "GLM-4.5-Air": 45 * 3 * 4096 * 1408, "Mixtral-8x7B": 0}


# Bytes of the files: GiB of MXFP4 in table 1 of the model card of gpt-oss; `total_size` in the index of DeepSeek-V3 is
# 688.6 GB, of which the layer for further tokens takes 11.5 G parameters in FP8 and copies of both embeddings.
QUANTIZED = {
    "gpt-oss-120b": 60.8 * 2**30,
    "DeepSeek-V3": 688.587e9 - 11.5e9 - 2 * 2 * 0.927e9,
    "Mixtral-8x7B": 2 * 46.703e9,
    "Switch-base-32": 4 * 1.9785e9,
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_of_quantized_weights_follow_from_the_configuration(name: str) -> None:
    folder = str(CONFIGS / name)
    found = configured_bytes(empty_model(folder, dequantize=True), load_config(folder))
    assert found.known_by == BY_CONFIG
    assert found.bytes == pytest.approx(QUANTIZED[name], rel=0.002)
