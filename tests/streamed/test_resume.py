"""A streamed run that was interrupted goes on where it was, and ends with the bytes that it would have had."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from scripts import run

from hf_mcsmoe import LoSparseConfig, MergeConfig, QuantizationConfig, RepairConfig, SparsityConfig
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.streaming import blocks
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import StreamConfig, held_bytes
from hf_mcsmoe.streamed.journal import BLOCKS, BUDGETS, CURVES, RANKS, STATISTICS, Journal

pytestmark = [
    pytest.mark.filterwarnings("ignore:The repair left"),
    pytest.mark.filterwarnings("ignore:Few calibration tokens"),
]
ALL = {
    "repair": RepairConfig(method="joint", sequential=True),
    "low_rank": LoSparseConfig(rank=2, keep=0.25),
    "quantization": QuantizationConfig(bits=4, group_size=8),
}
NARROW = {**ALL, "low_rank": None, "sparsity": SparsityConfig("wanda", "units", 1 / 3)}
MEASURED = MergeConfig(experts=4, budget="measured", reduce="auto")
GRADIENTS = MergeConfig(experts=4, saliency="taylor", merging="fisher")
COMPETING = {"low_rank": LoSparseConfig(energy=0.5, scope="global", keep=0.1, allow_dense=True)}


class Killed(BaseException):
    """Ends a run as a kill does: nothing after it is done."""


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def source(name: str, folder: Path, dtype: torch.dtype = torch.float32, router_loss: float = 0.0) -> dict[str, Any]:
    """Save a model; returns the arguments of `compress_folder` but for output and options."""
    model = build(name).to(dtype)
    if router_loss:
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, router_loss
    model.save_pretrained(folder / "source")
    rows, held_out = batches(name, model, 2), batches(name, model, 3)[2:]
    if model.config.is_encoder_decoder:
        rows = [{**row, "labels": row["decoder_input_ids"]} for row in rows]
    return {
        "source": folder / "source", "batches": rows, "config": MergeConfig(experts=4), "held_out": held_out
    }  # fmt: skip


def killed_at(monkeypatch: pytest.MonkeyPatch, save: int, *, after: bool, states: set[str]) -> None:
    """Let the journal's n-th save end the run, before or after it has been written; adds its state to `states`."""
    count, write = iter(range(1, 1000)), Journal.save

    def watched(self: Journal) -> None:
        number = next(count)
        if number == save:
            states.add(self.state)
        if number == save and not after:
            raise Killed
        write(self)
        if number == save:
            raise Killed

    monkeypatch.setattr(Journal, "save", watched)


def _interrupted(
    given: dict[str, Any], output: Path, monkeypatch: pytest.MonkeyPatch, states: set[str]
) -> Iterator[int]:
    """Begin a run again and again, each ended one save later than the last; yields the saves of each."""
    for save in range(1, 100):
        with monkeypatch.context() as patch:
            killed_at(patch, 2, after=save % 2 == 0, states=states)
            try:
                compress_folder(output=output, **given)
                return
            except Killed:
                yield save


@pytest.mark.parametrize(
    ("name", "options", "is_mapped"),
    [
        ("mixtral", {"repair": RepairConfig()}, True),
        ("mixtral", {"config": GRADIENTS}, True),
        pytest.param("mixtral", {"config": GRADIENTS, "router_loss": 3.0}, False, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {"config": GRADIENTS, "repair": RepairConfig()}, False, marks=pytest.mark.slow),
        pytest.param("switch_transformers", {"config": GRADIENTS}, True, marks=pytest.mark.slow),
        pytest.param("mixtral", {"config": MEASURED}, False, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"config": MEASURED, "repair": RepairConfig()}, True, marks=pytest.mark.slow),
        pytest.param("mixtral", ALL | COMPETING, True, marks=pytest.mark.slow),
        pytest.param("switch_transformers", COMPETING | {"config": MEASURED}, False, marks=pytest.mark.slow),
        pytest.param("mixtral", ALL, True, marks=pytest.mark.slow),
        pytest.param("mixtral", NARROW | {"dtype": torch.bfloat16}, True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"sparsity": SparsityConfig()}, False, marks=pytest.mark.slow),
        pytest.param("switch_transformers", {"repair": RepairConfig()}, True, marks=pytest.mark.slow),
        pytest.param("switch_transformers", ALL, False, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {"repair": RepairConfig()}, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_ended_after_each_step_ends_with_the_same_bytes(
    name: str, options: dict[str, Any], is_mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": torch.float32, "router_loss": 0.0} | options
    made = source(name, tmp_path, options.pop("dtype"), options.pop("router_loss"))
    given, states = made | options, set[str]()
    compress_folder(output=tmp_path / "whole" / "out", **given)
    if is_mapped:  # no byte is left for hidden states
        given["stream"] = StreamConfig(memory=held_bytes(Folder(tmp_path / "source").model))
    (tmp_path / "parts").mkdir()
    number = len(blocks(Folder(tmp_path / "source").model))
    ends = list(_interrupted(given, tmp_path / "parts" / "out", monkeypatch, states))
    assert len(ends) > (2 * number if given["config"] == GRADIENTS else 5)
    more = {CURVES, BUDGETS} if given["config"] == MEASURED else set()
    more |= {RANKS} if COMPETING.items() <= given.items() else set()
    assert states >= {STATISTICS, BLOCKS, *more}
    assert hashes(tmp_path / "parts" / "out") == hashes(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    done = run("benchmarks/kill_and_resume.py", "--runs", "12")
    assert done.returncode == 0, done.stderr
    assert "12 of 12 runs ended with the same bytes and left nothing behind" in done.stdout
