"""Layouts of two processes by Transformers' `DistributedConfig`: tensor, data and expert parallelism, without us."""

import copy
import json
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from merged import TESTS, Example, example, merge, run_python, save
from pruned import pruned, substituted
from quantized import by_expert, decomposed, quantize_model

from hf_mcsmoe import MergeConfig

NAMES = ["mixtral", "qwen3_moe", "deepseek_v3"]
# Whose experts no plan of the family splits: they are whole in each process.
LOW_RANK = "mixtral, low rank"
FEW_BITS = ["mixtral, bits by expert", "deepseek_v3, pruned, 4 bits"]
CONSTANTS = "mixtral, constants"
WHOLE = {LOW_RANK, *FEW_BITS, CONSTANTS}
OTHERS = ["mixtral, pruned", *FEW_BITS, CONSTANTS]
# Along which axis each splits `down_proj` [G, D, F], if any.
EXPERTS_SPLIT = {"plain": None, "tp": 2, "fsdp": 0, "tp and ep": 0, "fsdp and ep": 0}
LAYOUTS = list(EXPERTS_SPLIT)
# By family and layout: how far the logits of two processes are from those of one, and the shapes that the first holds.
Reports = dict[str, dict[str, Any]]


def _half(shape: list[int], axis: int | None) -> list[int]:
    """Return the shape of the first of two parts, which is the larger."""
    return [size if place != axis else (size + 1) // 2 for place, size in enumerate(shape)]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _by_turns(saliency: list[torch.Tensor], *_: object) -> list[int]:
    """Keep two or four of eight experts: as many in each of two processes."""
    return [2 + 2 * (number % 2) for number in range(len(saliency))]


def _even(name: str) -> Example:
    """Merge a tiny model to counts that two processes can share."""
    base = build(name)
    plan, merged = merge(base, name, MergeConfig(budget=_by_turns))
    assert {len(layer.dominant) for layer in plan.layers.values()} == {2, 4}
    return Example(name, base, inputs(name, base), plan, merged)


def _stored_otherwise() -> Iterable[Example]:
    """Yield models that are pruned, in few bits, or both."""
    yield replace(pruned("mixtral", _by_turns), name=OTHERS[0])
    yield replace(by_expert("mixtral"), name=FEW_BITS[0])
    yield replace(substituted("mixtral"), name=CONSTANTS)
    case = pruned("deepseek_v3", "uniform")
    yield replace(case, name=FEW_BITS[1], merged=quantize_model(copy.deepcopy(case.merged)))


def _reports(cases: Iterable[Example], folder: Path, checks: str = "computed") -> Reports:
    """Run, or train, models under every layout."""
    folders = [str(save(case, folder)) for case in cases]
    script, report, port = TESTS / "parallel_without_package.py", folder / "report.json", str(_free_port())

    def run(rank: int) -> tuple[int, str]:
        where = folder / str(rank)
        where.mkdir()
        done = run_python([str(script), str(rank), port, str(report), checks, *folders], where)
        return done.returncode, done.stderr

    with ThreadPoolExecutor(2) as pool:
        for code, errors in pool.map(run, range(2)):
            assert code == 0, errors
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What two processes found of merged models."""
    small = replace(example("mixtral"), name=LOW_RANK, merged=decomposed("mixtral"))
    return _reports([*map(_even, NAMES), small], tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def other_reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What two processes found of models that are pruned or in few bits."""
    return _reports(_stored_otherwise(), tmp_path_factory.mktemp("parallel"), "trained")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*NAMES, LOW_RANK])
def test_two_processes_give_the_logits_of_one(name: str, layout: str, reports: Reports) -> None:
    assert reports[f"{name}, {layout}"]["distance"] < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*NAMES, LOW_RANK])
def test_a_process_holds_the_half_that_the_layout_says(name: str, layout: str, reports: Reports) -> None:
    _check_half(name, layout, reports)


def _check_half(name: str, layout: str, reports: Reports) -> None:
    whole, held = reports[f"{name}, plain"], reports[f"{name}, {layout}"]
    experts, attention = EXPERTS_SPLIT[layout], None if layout == "plain" else 0
    if layout.startswith("tp"):
        experts = None if name in WHOLE else experts
        attention = (
            None if name.startswith("deepseek_v3") else attention
        )  # the family's plan leaves its attention whole
    assert held["experts"] == _half(whole["experts"], experts)
    assert held["attention"] == _half(whole["attention"], attention)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_pruned_or_in_few_bits_computes_and_trains_alike(
    name: str, layout: str, other_reports: Reports
) -> None:
    found = other_reports[f"{name}, {layout}"]
    assert found["distance"] < 1e-5
    assert found["gradients"] < 1e-5
    assert found["saved"]
    _check_half(name, layout, other_reports)
