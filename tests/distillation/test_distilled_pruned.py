"""Distillation of pruned students: their routers have fewer outputs than the teacher's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_trainer
from helpers import logits
from pruned import pruned

from hf_mcsmoe import moe_layers
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_routers

# What is trained, and with which other terms of the loss.
PARTS: dict[str, dict[str, Any]] = {
    "all": {"expert_weight": 1.0, "hidden_weight": 1.0},
    "experts": {},
    "routers": {},
    "all, routers too": {"freeze_routers": False},
}


def _routers(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for _, router in cut_routers(model) for parameter in router.parameters()]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtral", "all"),
        *(pytest.param("mixtral", parts, marks=pytest.mark.slow) for parts in ("experts", "routers")),
        *(pytest.param("switch_transformers", parts, marks=pytest.mark.slow) for parts in ("all", "all, routers too")),
    ],
)
def test_a_pruned_student_comes_nearer_to_its_teacher_and_loads_as_it_was_trained(
    name: str, parts: str, tmp_path: Path
) -> None:
    case, options = pruned(name), {"train_parts": parts.partition(",")[0], **PARTS[parts]}
    student = copy.deepcopy(case.merged)
    routers = _routers(student)
    # The same rows at each step, and little of another loss: what falls is the divergence.
    options |= {
        "kd_weight": 100.0,
        "learning_rate": 2e-2,
        "max_steps": 8,
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
    }
    trainer = make_trainer(name, tmp_path, model=student, teacher=case.base, save_strategy="no", **options)
    trainer.train()
    losses = [entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    is_same = all(torch.equal(*pair) for pair in zip(routers, _routers(student), strict=True))
    assert is_same == (parts in ("all", "experts"))
    trainer.save_model(str(tmp_path / "trained"))
    loaded = type(case.merged).from_pretrained(tmp_path / "trained")
    assert [layer.num_experts for layer in moe_layers(loaded)] == [layer.num_experts for layer in moe_layers(student)]
    torch.testing.assert_close(logits(loaded, case.batch), logits(student.eval(), case.batch), atol=1e-6, rtol=1e-5)
