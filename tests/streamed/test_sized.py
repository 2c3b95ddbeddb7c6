"""A size from folder to folder is bit for bit the one in memory, also where a run was killed."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DEVICE, build
from helpers import batches
from safetensors.torch import load_file

from hf_mcsmoe import MergeConfig, RepairConfig, compress
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import Saving, StreamConfig, held_bytes
from hf_mcsmoe.streamed.journal import BLOCKS, CURVES, RESULT, STATISTICS, Journal

MERGE, NONE = MergeConfig(), RepairConfig(method="none")
PRUNE = SizeConfig(0.7, bits=(), reduce="prune", ranks=())
FEW = SizeConfig(0.5, bits=(4,), reduce="prune", group_size=8, ranks=(), min_experts=2)


class Killed(BaseException):
    """Ends a run as a kill does."""


def told(folder: Path) -> dict[str, Any]:
    """Return weights, and all else but the lines of bytes on disk, headers included, that differ."""
    found: dict[str, Any] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif not file.name.endswith("index.json"):
            lines = file.read_text().splitlines()
            found[file.name] = [line for line in lines if "bytes on disk" not in line and "bytes_on_disk" not in line]
    return found


def assert_alike(ours: Path, theirs: Path) -> None:
    """Check that two folders hold the same."""
    streamed, expected = told(ours), told(theirs)
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(streamed[name], value) if isinstance(value, torch.Tensor) else streamed[name] == value
        assert same, name


def given(name: str, folder: Path) -> dict[str, Any]:
    """Save a model; returns its batches, and others to judge on."""
    model = build(name)
    model.save_pretrained(folder / "source")
    data = batches(name, model, 6)
    return {"batches": data[:4], "held_out": data[4:5], "check": {"other": data[5:]}}


def in_memory(name: str, folder: Path, output: Path, options: dict[str, Any]) -> None:
    """Do it with all of the model in memory."""
    model = type(build(name)).from_pretrained(folder / "source").to(DEVICE)
    compress(model, config=MERGE, **options).save_pretrained(output)


@pytest.mark.parametrize(
    ("name", "size", "repair"),
    [
        ("mixtral", PRUNE, NONE),
        pytest.param("qwen3_moe", SizeConfig(0.4, group_size=8, bits=(8, 4)), None, marks=pytest.mark.slow),
        pytest.param(
            "switch_transformers", SizeConfig(0.7, group_size=8, bits=(4,), ranks=()), None, marks=pytest.mark.slow
        ),
    ],
)
def test_bit_for_bit(name: str, size: SizeConfig, repair: RepairConfig | None, tmp_path: Path) -> None:
    options = {**given(name, tmp_path), "size": size, "repair": repair}
    scores = tmp_path / "scores.safetensors"
    folder = Folder(tmp_path / "source", device=DEVICE)
    compress_folder(folder, tmp_path / "a" / "out", config=MERGE, **options, saving=Saving(scores=scores))
    in_memory(name, tmp_path, tmp_path / "b" / "out", options)
    assert_alike(tmp_path / "a" / "out", tmp_path / "b" / "out")
    statistics = RoutingStatistics.load(scores)  # which hold what choices cost, so that nothing is measured again
    stages: set[str] = set()
    options |= {"size": replace(size, size=size.size + 0.1), "statistics": statistics}
    compress_folder(
        folder, tmp_path / "c" / "out", config=MERGE, **options, progress=lambda stage, *_: stages.add(stage)
    )
    assert stages.isdisjoint(["statistics", "curves"])


@pytest.mark.slow
def test_bit_for_bit_whichever_kernels_mkl_chooses() -> None:
    case = [f"{__file__}::test_bit_for_bit", "-k", "switch", "-m", "slow", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *case],
        env={**os.environ, "MKL_CBWR": ""},  # which the other tests hold to one
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(("size", "is_mapped"), [(PRUNE, False), (FEW, True)])
@pytest.mark.slow
def test_a_run_ended_after_each_step_ends_with_the_same_bytes(
    size: SizeConfig, is_mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**given("mixtral", tmp_path), "size": size, "repair": NONE, "config": MERGE}
    source, write = tmp_path / "source", Journal.save
    compress_folder(source, tmp_path / "whole" / "out", **options)
    if is_mapped:
        options["stream"] = StreamConfig(memory=held_bytes(Folder(source).model))
    (tmp_path / "parts").mkdir()
    states = list[str]()
    for number in range(1, 100):
        saves = iter(range(1, 100))

        def save(self: Journal, number: int = number, saves: Any = saves) -> None:
            is_last = next(saves) == 2
            if is_last and number % 2:
                raise Killed
            write(self)
            is_placing = self.state == RESULT and RESULT not in states
            states.append(self.state)
            if is_last or is_placing:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "save", save)
            try:
                compress_folder(source, tmp_path / "parts" / "out", **options)
                break
            except Killed:
                continue
    assert number > 8
    assert states == sorted(states, key=[STATISTICS, CURVES, BLOCKS, RESULT].index), "none is gone back to"
    assert states.count(RESULT) == 2
    hashes = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name / "out").iterdir()}
        for name in ("parts", "whole")
    ]
    assert hashes[0] == hashes[1]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["out"]
