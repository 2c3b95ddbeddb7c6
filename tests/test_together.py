"""Two processes that work together end with what one makes alone; where one fails, the other says why."""

import copy
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from pair import in_two_processes
from transformers import PreTrainedModel

import hf_mcsmoe as mc
from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.methods.alignment import weight_matching
from hf_mcsmoe.methods.sample import SAMPLE
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.methods.view import LayerView
from hf_mcsmoe.processes import Processes, current, started
from hf_mcsmoe.repair.methods import LayerRepair
from hf_mcsmoe.repair.repair import RepairReport

REPAIRS = ["refit", "joint", "local", "mean_shift"]
NEEDS = [name for name in STATISTICS if STATISTICS.find(name).from_data]
OF_FORWARD = [name for name in NEEDS if not STATISTICS.find(name).gradients]


def _distance(one: mc.RoutingStatistics, other: mc.RoutingStatistics) -> float:
    """Return the largest distance of two sums over their size; infinite where their names or shapes differ."""
    largest = 0.0
    for name, sums in one.layers.items():
        assert sums.keys() == other[name].keys()
        for key, value in sums.items():
            difference = (value.double() - other[name][key].double()).norm()
            largest = max(largest, float(difference / value.double().norm().clamp(min=1e-12)))
    return largest


def _equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(states[1][key].equal(states[0][key]) for key in states[0])


def _aligned(counted: list[int]) -> Callable[[LayerView, int, int], torch.Tensor | None]:
    def align(view: LayerView, reference: int, expert: int) -> torch.Tensor | None:
        counted.append(expert)
        return weight_matching(view, reference, expert)

    return align


def _statistics(name: str, needs: list[str]) -> dict[str, Any]:
    model, found = build(name), dict[str, Any]()
    given = [*batches(name, model), *batches(name, model)][:3]
    for number in (1, 3):  # fewer than processes, and a number that they cannot share alike
        alone = mc.collect_statistics(model, given[:number], needs)
        with mc.together():
            found[f"{number}"] = _distance(alone, mc.collect_statistics(model, given[:number], needs))
    inputs = capture_inputs(mc.moe_layers(model), given)
    with mc.together():
        again = capture_inputs(mc.moe_layers(model), given)
    pairs = [(value, vars(again[name])[key]) for name, kept in inputs.items() for key, value in vars(kept).items()]
    return {**found, "inputs": all(one.equal(other) for one, other in pairs)}


def _without_seconds(report: RepairReport) -> dict[str, LayerRepair]:
    return {name: replace(layer, seconds=0.0) for name, layer in report.layers.items()}


def _results(repairs: list[str]) -> dict[str, Any]:
    model, given, counted = build("mixtral"), batches("mixtral", build("mixtral")), []
    config = mc.MergeConfig(experts=0.5, alignment=_aligned(counted))
    plan = mc.plan_merge(model, mc.collect_statistics(model, given), config)
    merged = mc.merge_experts(model, plan)
    found: dict[str, Any] = {"alone": len(counted)}
    counted.clear()
    with mc.together():
        found["merged"] = _equal(merged, mc.merge_experts(model, plan))
    found["together"] = len(counted)
    for method in repairs:
        fit = mc.RepairConfig(method=method, steps=3)
        one, two = copy.deepcopy(merged), copy.deepcopy(merged)
        report = mc.repair_experts(one, model, given, fit)
        with mc.together():
            other = mc.repair_experts(two, model, given, fit)
        reports = [replace(item, seconds=0.0, layers=_without_seconds(item)).to_dict() for item in (report, other)]
        found[method] = _equal(one, two) and not _equal(one, merged) and reports[0] == reports[1]
    return found


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("mixtral", ["counts", "logit_gram", SAMPLE]),
        pytest.param("mixtral", NEEDS, marks=pytest.mark.slow),
        pytest.param("switch_transformers", OF_FORWARD, marks=pytest.mark.slow),
    ],
)
def test_sums_and_inputs_are_those_of_one_process(name: str, needs: list[str], tmp_path: Path) -> None:
    for found in in_two_processes(lambda rank: _statistics(name, needs), tmp_path):
        assert found["inputs"]
        assert found["1"] < 1e-12
        assert found["3"] < 1e-12


@pytest.mark.parametrize("repairs", [["refit"], pytest.param(REPAIRS, marks=pytest.mark.slow)], ids=["refit", "all"])
@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_experts_are_aligned_and_repaired_in_shares_as_by_one(repairs: list[str], tmp_path: Path) -> None:
    first, second = in_two_processes(lambda rank: _results(repairs), tmp_path)
    assert first["together"] + second["together"] == first["alone"]
    assert abs(first["together"] - second["together"]) <= 2  # of two layers
    for found in (first, second):
        assert all(found[name] for name in ("merged", *repairs)), found


def _one_ends(end: Callable[[], None]) -> str:
    """Return what is told where one process ends in the middle."""
    model, given = build("mixtral"), batches("mixtral", build("mixtral"))

    def work() -> None:
        with mc.together(patience=60) as processes:
            if processes.rank == 1:
                end()
            mc.collect_statistics(model, given)

    with pytest.raises((RuntimeError, ValueError)) as raised:
        work()
    assert current().size == 1
    return str(raised.value)


def _fail() -> None:
    raise ValueError("its disk is full")


def test_the_others_tell_why_one_failed(tmp_path: Path) -> None:
    told, own = in_two_processes(lambda rank: _one_ends(_fail), tmp_path)
    assert told == "Process 1 of 2 (from 0 on) failed, so the others end as well: its disk is full"
    assert own == "its disk is full"


def test_the_others_end_where_one_was_killed(tmp_path: Path) -> None:
    told, own = in_two_processes(lambda rank: _one_ends(lambda: os._exit(9)), tmp_path)
    assert own is None
    assert "ended without a word" in told
    assert "start all of them again" in told


def _first_writes_long(rank: int) -> float:
    """Return for how long this process was kept, where the first one writes for longer than the others' patience."""
    begin = time.monotonic()
    with mc.together(patience=1) as processes:
        processes.gathered(rank)
        if processes.is_first:
            time.sleep(3)
    return time.monotonic() - begin


def test_the_others_wait_until_the_first_has_written(tmp_path: Path) -> None:
    assert min(in_two_processes(_first_writes_long, tmp_path)) >= 3


@pytest.mark.parametrize(("told", "number"), [(None, 1), ("", 1), ("1", 1), ("4", 4)])
def test_a_launcher_tells_how_many_were_started(
    told: str | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if told is not None:
        monkeypatch.setenv("WORLD_SIZE", told)
    assert started() == number


@pytest.mark.parametrize(
    ("told", "message"), [("two", "no number of processes"), ("0", "no number"), ("2", "no RANK")]
)
def test_half_of_what_a_launcher_sets_is_refused(told: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", told)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=message), mc.together():
        pytest.fail("nobody else is there")


class Told(Processes):
    """Processes in threads of this one, which have the keys of a store in common and send nothing."""

    def sent(self, value: Any, source: int) -> Any:
        """Return the value."""
        return value


class Store(dict[str, int]):
    """As much of a store as waiting takes."""

    def add(self, key: str, number: int) -> int:
        """Add to a value."""
        self[key] = self.get(key, 0) + number
        return self[key]

    def check(self, keys: list[str]) -> bool:
        """Tell whether all are there."""
        return all(key in self for key in keys)


def test_the_others_wait_for_each_thing_that_the_first_makes() -> None:
    store = Store()
    first, other = Told(0, 2, store=store), Told(1, 2, store=store)
    for number in range(2):
        waiting = threading.Thread(target=other.led, args=(int,), daemon=True)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive(), "nothing has been made"
        assert first.led(lambda number=number: number) == number
        waiting.join(30)
        assert not waiting.is_alive()
