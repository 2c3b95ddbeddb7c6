"""Models that two processes hold a part each of: calibrated and distilled to what one process makes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches
from merged import merge
from pair import in_two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_mcsmoe as mc
from hf_mcsmoe.methods.sample import SAMPLE
from hf_mcsmoe.methods.statistics import STATISTICS

pytestmark = pytest.mark.slow
LAYOUTS = {"fsdp": {"fsdp_size": 2}, "fsdp and ep": {"fsdp_size": 2, "ep_size": 2}}
OF_FORWARD = [name for name in STATISTICS if STATISTICS.find(name).from_data and not STATISTICS.find(name).gradients]
# Which tokens a sample keeps follows from their bits, and rounding differs where experts are elsewhere.
PLAIN = [name for name in OF_FORWARD if not STATISTICS.find(name).products and name != SAMPLE]
# As a Trainer calls what it saves while it trains, in which all rows of S are there.
TRAINED = "checkpoint-1"
PRUNINGS = [{}, {"importance": "magnitude", "aggregate": "max"}, {"uncertainty": True}]
LOSSES = [{}, {"hidden_weight": 0.1, "expert_weight": 0.1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model, and it merged to a number of experts that two processes can share."""
    path, base = tmp_path_factory.mktemp("sharded"), build("mixtral")
    base.save_pretrained(path / "base")
    merged = merge(base, "mixtral", mc.MergeConfig(experts=4, budget="uniform"))[1]
    merged.save_pretrained(path / "merged")
    mc.decompose_experts(merged, mc.LoSparseConfig(rank=2, keep=0.25)).save_pretrained(path / TRAINED)
    return path


def _load(path: Path, layout: dict[str, int] | None) -> Any:
    if layout:  # or threads that load weights form groups of processes, in another order in each
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    return AutoModelForCausalLM.from_pretrained(path, **options)


def _refused(path: Path, layout: dict[str, int], needs: list[str]) -> str:
    with pytest.raises(ValueError, match="split over processes") as raised:
        mc.collect_statistics(_load(path, layout), batches("mixtral", build("mixtral")), needs)
    return str(raised.value)


def _calibrated(path: Path) -> dict[str, Any]:
    given, found = batches("mixtral", build("mixtral"), 3), {}
    for name, needs in (("fsdp", OF_FORWARD), ("fsdp and ep", PLAIN)):
        alone = mc.collect_statistics(_load(path, None), given, needs)
        with mc.together():
            model = _load(path, LAYOUTS[name])
            shared = mc.collect_statistics(model, given, needs)
            with pytest.raises(ValueError, match="needs its weights whole"):
                mc.plan_merge(model, shared)
        assert shared.fingerprint == alone.fingerprint
        pairs = [(value, shared[layer][key]) for layer, sums in alone.layers.items() for key, value in sums.items()]
        found[name] = max(
            float((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-9)) for one, other in pairs
        )
    with mc.together():
        found["gradients"] = _refused(path, LAYOUTS["fsdp"], ["taylor"])
        found["experts"] = _refused(path, LAYOUTS["fsdp and ep"], ["contribution"])
        found["tensors"] = _refused(path, {"tp_size": 2}, ["counts"])
    return found


def test_calibration(folder: Path, tmp_path: Path) -> None:
    for found in in_two_processes(lambda rank: _calibrated(folder / "base"), tmp_path):
        assert found["fsdp"] < 1e-12
        assert found["fsdp and ep"] < 1e-6  # what reaches a token is added in another order
        assert "taylor reads gradients" in found["gradients"]
        assert "contribution runs experts" in found["experts"]
        assert "tp_size=2" in found["tensors"]


def _rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 60, (8,), generator=draw) for _ in range(16)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in tokens]


def _distilled(
    folder: Path,
    output: Path,
    layout: dict[str, int] | None,
    name: str = "merged",
    pruning: dict[str, Any] | None = None,
    **losses: float,
) -> list[float]:
    arguments = mc.DistillationArguments(
        output_dir=str(output),
        per_device_train_batch_size=2 if layout else 4,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **losses,
    )
    student, teacher = (_load(folder / one, layout) for one in (name, "base"))
    callbacks = [] if pruning is None else [mc.SparsificationCallback(0.25, start=1, end=1, **pruning)]
    trainer = mc.DistillationTrainer(
        model=student, args=arguments, teacher=teacher, train_dataset=_rows(), callbacks=callbacks
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:No tokenizer lies", "ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_distillation(losses: dict[str, float], folder: Path, tmp_path: Path) -> None:
    expected = _distilled(folder, tmp_path / "one", None, **losses)
    for name, layout in LAYOUTS.items():
        output = tmp_path / name
        for found in in_two_processes(lambda rank: _distilled(folder, output, layout, **losses), tmp_path):  # noqa: B023
            assert found == pytest.approx(expected, rel=1e-4)
        one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "one", output))
        assert one.keys() == two.keys()
        assert max(float((two[key] - value).abs().max()) for key, value in one.items()) < 1e-3
        start = load_file(folder / "merged" / "model.safetensors")
        assert max(float((one[key] - value).abs().max()) for key, value in start.items()) > 1e-2
        # What was saved is whole, and loads in one process.
        assert type(_load(output, None)).__name__ == type(_load(folder / "merged", None)).__name__


def _shares(folder: Path) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the rows of S that each expert of a saved student has kept, and its weights."""
    entries = json.loads((folder / "config.json").read_text())["mcsmoe"]["layers"].values()
    counts = [count for layer in entries for weight in layer["low_rank"].values() for count in weight["kept_rows"]]
    return counts, load_file(folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore:No tokenizer lies", "ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
def test_rows_of_low_rank_experts_are_pruned(pruning: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    expected = _distilled(folder, tmp_path / "one", None, TRAINED, pruning)

    def work(rank: int) -> list[float]:
        return _distilled(folder, tmp_path / "two", LAYOUTS["fsdp"], TRAINED, pruning)

    for found in in_two_processes(work, tmp_path):
        assert found == pytest.approx(expected, rel=1e-4)
    (one, weights), (two, others) = (_shares(tmp_path / name) for name in ("one", "two"))
    assert one == two
    rows = load_file(folder / TRAINED / "model.safetensors")
    total = sum(kept.numel() for name, kept in rows.items() if name.endswith("_kept"))
    assert sum(one) == round(0.25 * total)
    assert all(torch.equal(others[name], value) for name, value in weights.items() if name.endswith("_rows"))
    assert max(float((others[name] - value).abs().max()) for name, value in weights.items()) < 1e-3


def _in_place(folder: Path) -> list[str]:
    merged, base = (_load(folder / name, LAYOUTS["fsdp"]) for name in ("merged", "base"))
    given = batches("mixtral", build("mixtral"))
    attempts: list[Callable[[], Any]] = [
        lambda: mc.compress(base, given),
        lambda: mc.decompose_experts(merged, mc.LoSparseConfig(rank=2)),
        lambda: mc.quantize_experts(merged),
        lambda: mc.sparsify_experts(base, given),
        lambda: mc.repair_experts(merged, base, given),
    ]
    told = []
    for attempt in attempts:
        with pytest.raises(ValueError, match="is split over processes") as raised:
            attempt()
        told.append(str(raised.value))
    return told


def test_what_changes_experts_in_place_needs_them_whole(folder: Path, tmp_path: Path) -> None:
    purposes = ["a compression", "a decomposition", "stored in few bits", "inside experts", "a repair"]
    for told in in_two_processes(lambda rank: _in_place(folder), tmp_path):
        for purpose, sentence in zip(purposes, told, strict=True):
            assert purpose in sentence
            assert "needs its weights whole: load it without" in sentence
