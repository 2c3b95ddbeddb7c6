"""Which way a compression goes: `plan` tells what `compress` does, and says why something is not streamed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build
from helpers import Run

from hf_mcsmoe import MergeConfig, RepairConfig
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.plan_run import hub_line
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import Streaming
from hf_mcsmoe.cli.way import run_by
from hf_mcsmoe.forecast.needs import IN_MEMORY, STREAMED
from hf_mcsmoe.forecast.way import NO_WAY
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model
from hf_mcsmoe.search.config import SizeConfig

HALF = ["--experts", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model's folder."""
    path = tmp_path_factory.mktemp("source")
    build("mixtral").save_pretrained(path)
    return path


def _plan(run: Run, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Return what `plan` writes and prints."""
    file = folder.parent / f"{folder.name}.json"
    code, out, error = run("plan", str(folder), *options, "--json", str(file))
    assert code == 0, error
    return json.loads(file.read_text()), " ".join(out.split())


def _has(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Let this machine have so much memory free, and the process hold a known size."""
    monkeypatch.setattr("hf_mcsmoe.cli.way.free_memory", lambda: memory)
    monkeypatch.setattr("hf_mcsmoe.streamed.config.free_memory", lambda: memory)
    monkeypatch.setattr("hf_mcsmoe.cli.way.resident", lambda: 10**6)


@pytest.mark.parametrize("repair", ["none", "refit"])
def test_plan_tells_what_compress_does(repair: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, config = Layers.of(empty_model(str(folder))), MergeConfig(experts=0.5)
    stages = {"repair": None if repair == "none" else RepairConfig(), "quantization": None, "low_rank": None}
    stages |= {"sparsity": None, "size": None}
    given = [*HALF, "--repair", repair, "--num-samples", "8", "--max-length", "8"]
    _has(monkeypatch, 10**12)
    needed = {name: way["needed"] for name, way in _plan(run, folder, *given)[0]["needs"].items()}
    assert needed[STREAMED] < needed[IN_MEMORY], "the margin that is between them is what is looked at"
    for memory, name in [(needed[IN_MEMORY], IN_MEMORY), (needed[IN_MEMORY] - 1, STREAMED)]:
        _has(monkeypatch, memory - 10**6)
        told, _ = _plan(run, folder, *given)
        assert told["way"]["name"] == name
        chosen = Streaming().is_chosen(
            layers, config, stages, None, Calibration(["text.jsonl"], num_samples=8, max_length=8)
        )
        assert chosen == (name == STREAMED)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--size", "0.8", "--memory", "1kB"], "too small for one block"), ([*HALF, "--memory", "1kB"], "too small")],
)
def test_what_is_not_streamed_is_judged_in_memory(
    options: list[str], sentence: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, 10**12)
    needed = _plan(run, folder, *options)[0]["needs"][IN_MEMORY]["needed"]
    _has(monkeypatch, needed - 10**6 - 1)
    told, out = _plan(run, folder, *options)
    assert told["way"]["name"] == NO_WAY
    assert told["way"]["reason"].startswith("in memory it takes")
    assert sentence in told["not_streamed"]
    assert f"not block by block: {told['not_streamed']}" in out


def test_hidden_states_that_do_not_fit_lie_on_disk(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, 10**12)
    streamed = [_plan(run, folder, *HALF, "--memory", memory)[0]["needs"][STREAMED] for memory in ("100GB", "1MB")]
    held, mapped = ({**way["phases"]["merging"]} for way in streamed)
    assert held.pop("hidden states") > 10**6
    assert mapped.pop("hidden states") == 0
    assert held == mapped
    # Of the original, the merged and the repaired model, 256 rows of 512 tokens.
    width, itemsize = json.loads((folder / "config.json").read_text())["hidden_size"], 4
    assert streamed[1]["disk"] > 3 * 256 * 512 * width * itemsize


def test_what_goes_inside_experts_is_planned_block_by_block_too(folder: Path, run: Run) -> None:
    ways = {
        "whole": [],
        "zeros": ["--preset", "moe-pruner"],
        "units": ["--sparsify", "wanda", "--pattern", "units", "--sparsity", "0.25", "--repair", "none"],
    }
    told = {name: _plan(run, folder, "--experts", "1.0", *options)[0] for name, options in ways.items()}
    layers = Layers.of(empty_model(str(folder)))
    quarter = sum(layer.num_parameters for layer in layers) // 4
    parameters = {name: item["result"]["parameters"] for name, item in told.items()}
    assert parameters == {name: parameters["whole"] - (quarter if name == "units" else 0) for name in ways}
    assert told["whole"]["result"]["bytes"] - told["units"]["result"]["bytes"] == 4 * quarter
    assert all(item["not_streamed"] is None for item in told.values())
    states = {name: item["needs"][STREAMED]["phases"]["merging"]["hidden states"] for name, item in told.items()}
    assert states == {name: (1 if name == "whole" else 2) * states["whole"] for name in ways}
    code, _, error = run("plan", str(folder), "--sparsify", "wanda")
    assert (code, "give --experts (1.0 for all of them) in place of --size" in error) == (1, True)


def test_a_size_is_planned_with_its_sweeps_and_both_results(folder: Path, run: Run) -> None:
    rows = ["--num-samples", "8", "--max-length", "8"]
    told, half = (_plan(run, folder, *options, *rows)[0] for options in (["--size", "0.8"], HALF))
    assert told["needs"][STREAMED]["read"] == 3 * told["source"]["bytes"] == 3 * half["needs"][STREAMED]["read"] / 2
    late = _plan(run, folder, *HALF, "--saliency", "taylor", *rows)[0]
    assert late["needs"][STREAMED]["read"] == 3 * told["source"]["bytes"]
    assert "gradients" in late["needs"][STREAMED]["phases"]["statistics"]
    assert told["needs"][STREAMED]["disk"] > 2 * told["run"]["result"]
    parts = told["needs"][IN_MEMORY]["phases"]["saving"]
    assert parts["results before"] == told["run"]["result"] > 0
    layers, calibration = Layers.of(empty_model(str(folder))), Calibration(["text.jsonl"], num_samples=8)
    stages = {"repair": RepairConfig(), "quantization": None, "low_rank": None, "size": SizeConfig(0.8)}
    stages["sparsity"] = None
    sums = RoutingStatistics("")
    held = [None, sums, replace(sums, curves={layers.names[0]: None})]
    assert [run_by(layers, MergeConfig(), stages, calibration, one).sweeps for one in held] == [3, 2, 1]
    assert run_by(layers, MergeConfig(), {**stages, "size": None}, calibration, sums).sweeps == 1


def test_what_a_model_of_the_hub_takes_beside_its_result() -> None:
    assert hub_line(10**9, 2).startswith("from the Hub 1 GB are fetched")
    for sweeps in (1, 2, 3):
        assert f"--drop-source-cache {sweeps} GB" in hub_line(10**9, sweeps)
