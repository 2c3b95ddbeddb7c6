"""Models that two processes hold a part each of: calibrated and distilled to what one process makes."""

import os
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
LOSSES = [{}, {"hidden_weight": 0.1, "expert_weight": 0.1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model, and it merged to a number of experts that two processes can share."""
    path, base = tmp_path_factory.mktemp("sharded"), build("mixtral")
    base.save_pretrained(path / "base")
    merge(base, "mixtral", mc.MergeConfig(experts=4, budget="uniform"))[1].save_pretrained(path / "merged")
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


def _distilled(folder: Path, output: Path, layout: dict[str, int] | None, **losses: float) -> list[float]:
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
    student, teacher = (_load(folder / name, layout) for name in ("merged", "base"))
    trainer = mc.DistillationTrainer(model=student, args=arguments, teacher=teacher, train_dataset=_rows())
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
