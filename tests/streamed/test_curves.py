"""What choices cost, measured block by block, is what it is in memory, also where the sweep was interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import DEVICE, build
from helpers import batches

from hf_mcsmoe import MergeConfig, collect_statistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import measure_curves, needs_of
from hf_mcsmoe.streamed.curves import curves_by_blocks
from hf_mcsmoe.streamed.states import States

FEW: dict[str, Any] = {"bits": (), "reduce": "merge", "ranks": ()}


class Killed(BaseException):
    """Ends a sweep as a kill does."""


@pytest.mark.parametrize(
    ("name", "search", "repair"),
    [
        ("mixtral", FEW, RepairConfig(method="none")),
        pytest.param(
            "switch_transformers", {"bits": (4,), "ranks": (), "group_size": 8}, JOINT, marks=pytest.mark.slow
        ),
        pytest.param("deepseek_v3", {"bits": (8, 4), "ranks": (), "group_size": 8}, JOINT, marks=pytest.mark.slow),
    ],
)
def test_curves_are_those_in_memory_and_of_a_sweep_that_goes_on(
    name: str, search: dict[str, Any], repair: RepairConfig, tmp_path: Path
) -> None:
    model, merge, size = build(name), MergeConfig(skip=()), SizeConfig(0.5, **search)
    model.save_pretrained(tmp_path / "source")
    rows = batches(name, model, 4)
    loaded = type(model).from_pretrained(tmp_path / "source").to(DEVICE)
    statistics = collect_statistics(loaded, rows, needs_of(merge, size))
    expected = measure_curves(Layers.of(loaded), statistics, rows, merge, size, repair=repair)
    folder = Folder(tmp_path / "source", device=DEVICE)
    paths, kept = list(blocks(folder.model)), "{}"
    (tmp_path / "states").mkdir()
    found, ends = None, 0
    while found is None:
        states, told = States(tmp_path / "states", paths, mapped=ends % 2 == 1), json.loads(kept)

        def done(path: str, states: States = states, told: dict[str, Any] = told) -> None:
            nonlocal kept
            kept = json.dumps(told)
            states.forget(path)
            raise Killed

        try:
            found = curves_by_blocks(
                Layers.of(folder), statistics, rows, merge, size, repair=repair, states=states, kept=told, done=done
            )
        except Killed:
            ends += 1
    assert ends == len(paths)
    assert found == expected
    assert all(item.reduced for item in found.values())
