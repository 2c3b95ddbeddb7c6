"""Resuming: what no checkpoint of this model is, is refused before anything is loaded; NaN and the last good one."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_rows, make_student, make_trainer
from families import build
from merged import example, merge
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from hf_mcsmoe import LoSparseConfig, SparsificationCallback, compact, decompose_experts
from hf_mcsmoe.distillation.checkpoints import check_checkpoint, last_checkpoint, written_last

# PEFT asks for it by the name that Transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = {"train_parts": "lora", "lora_rank": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the merged model for a step."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer("mixtral", folder, max_steps=1).train()
    return folder / "checkpoint-1"


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train adapters for a step."""
    folder = tmp_path_factory.mktemp("adapters")
    make_trainer("mixtral", folder, max_steps=1, **LORA).train()
    return folder / "checkpoint-1"


def _low_rank(rank: int, *, compacted: bool = False) -> PreTrainedModel:
    model = decompose_experts(make_student("mixtral"), LoSparseConfig(rank=rank, keep=0.5), prune=True)
    return compact(model) if compacted else model


def _regrouped() -> PreTrainedModel:
    model = copy.deepcopy(example("mixtral").merged)
    layer = next(iter(model.config.mcsmoe["layers"].values()))
    layer["expert_map"] = layer["expert_map"][::-1]
    return model


def _wider() -> PreTrainedModel:
    model = make_student("mixtral")
    model.resize_token_embeddings(140)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_regrouped, "its experts are grouped differently"),
        (lambda: merge(build("qwen3_moe"), "qwen3_moe")[1], "it is of type 'mixtral', not 'qwen3_moe'"),
        (_wider, r"has the shape \(128, 32\) there and \(140, 32\) here"),
        (lambda: _low_rank(2), "is stored as dense experts there and as gate_up_proj of rank 2 with all rows of S"),
    ],
    ids=["experts", "family", "sizes", "low rank"],
)
def test_a_checkpoint_of_another_model_is_refused(model: Any, message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=f"holds a checkpoint of another model: .*{message}"):
        check_checkpoint(checkpoint, model())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: _low_rank(3), "gate_up_proj of rank 2 .* there and as gate_up_proj of rank 3"),
        (lambda: _low_rank(2, compacted=True), r"rank 2 with all rows of S.* here|rank 2 with \d+ rows of S"),
    ],
    ids=["rank", "form"],
)
def test_a_checkpoint_of_other_factors_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    make_trainer("mixtral", tmp_path, model=_low_rank(2), max_steps=1).train()
    check_checkpoint(tmp_path / "checkpoint-1", _low_rank(2))
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path / "checkpoint-1", model())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (LORA, "checkpoint", "was written without adapters"),
        ({}, "with_adapters", "was written with adapters"),
        (LORA | {"lora_rank": 4}, "with_adapters", "its adapters have r=2, those here 4"),
        (LORA | {"lora_targets": ["q_proj"]}, "with_adapters", "it adapts .*, which is not adapted here"),
    ],
    ids=["without", "with", "rank", "targets"],
)
def test_adapters_resume_with_the_same_adapters_alone(
    options: dict[str, Any], kind: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trainer = make_trainer("mixtral", tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(request.getfixturevalue(kind)))


def test_a_folder_that_is_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path / "run")
    with pytest.raises(ValueError, match=r"There is no checkpoint .*none to resume from"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none"))
    example("mixtral").merged.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is no checkpoint of a Trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)


def test_the_last_checkpoint_of_the_folder_is_checked_as_well(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    trainer = make_trainer("mixtral", tmp_path, model=_low_rank(2))
    with pytest.raises(ValueError, match="stored as dense experts there"):
        trainer.train(resume_from_checkpoint=True)


def test_a_half_written_checkpoint_is_none_to_resume_from(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path, model=_low_rank(2))
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="none was written to its end"):
        trainer.train(resume_from_checkpoint=True)


def test_the_last_checkpoint_is_the_one_of_most_steps_that_is_complete(tmp_path: Path) -> None:
    plain, pruned = written_last([]), written_last([SparsificationCallback()])
    assert last_checkpoint(tmp_path, plain) is None
    for step, files in ((9, 2), (100, 1), (110, 0)):  # 110 was killed early, 100 before the callback had written
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name in ("trainer_state.json", "sparsification.json")[:files]:
            (path / name).write_text("{}")
    assert last_checkpoint(tmp_path, plain) == tmp_path / "checkpoint-100"
    assert last_checkpoint(tmp_path, pruned) == tmp_path / "checkpoint-9"


def _spoil(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_whose_weights_are_not_finite_or_not_readable_is_none_to_resume_from(
    checkpoint: Path, with_adapters: Path, tmp_path: Path
) -> None:
    complete = written_last([])
    assert last_checkpoint(tmp_path / "nowhere", complete) is None
    for step in (100, 20, 9):  # written in this order, so that the newest file is the oldest step
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-999x").mkdir()
    (tmp_path / "checkpoint-200").mkdir()  # killed while it was written
    assert last_checkpoint(tmp_path, complete) == tmp_path / "checkpoint-100"
    _spoil(tmp_path / "checkpoint-100")
    assert last_checkpoint(tmp_path, complete) == tmp_path / "checkpoint-20"
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"half of it")
    assert last_checkpoint(tmp_path, complete) == tmp_path / "checkpoint-9"
    shutil.copytree(with_adapters, tmp_path / "checkpoint-30")
    assert last_checkpoint(tmp_path, complete) == tmp_path / "checkpoint-30"


@pytest.mark.parametrize("options", [{}, LORA], ids=["all", "lora"])
def test_weights_that_are_not_finite_are_not_saved(options: dict[str, Any], tmp_path: Path) -> None:
    # The first step leaves the weights as they are, the second one overflows them.
    trainer = make_trainer("mixtral", tmp_path, **options, max_steps=3, learning_rate=1e39, warmup_steps=1)
    with pytest.raises(
        RuntimeError, match=r"A weight is no longer finite at step 2; resume from .*checkpoint-1, with"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_resumed_run_goes_on_at_its_own_learning_rate(tmp_path: Path) -> None:
    runs = []
    for rate, start in ((1e-2, None), (4e-3, None), (4e-3, "checkpoint-2")):
        folder = tmp_path / str(len(runs))
        trainer = make_trainer("mixtral", folder, max_steps=4, warmup_steps=0, learning_rate=rate)
        trainer.train(resume_from_checkpoint=str(tmp_path / "0" / start) if start else None)
        runs.append([entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[2] == [*runs[0][:2], *runs[1][2:]]
    assert len(set(runs[2])) == 4


class Poison(TrainerCallback):
    """Makes a weight or a gradient NaN in some substep of the third step."""

    def __init__(self, what: str) -> None:
        self.what, self.kept = what, None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2 and self.what == "gradient":
            model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
        if state.global_step == 2:
            self.kept = {key: value.clone() for key, value in model.named_parameters()}

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2 and self.what == "loss":
            model.lm_head.register_forward_hook(lambda module, arguments, output: output * float("nan"))


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_stops_before_its_weights_become_nan(what: str, clipping: float, tmp_path: Path) -> None:
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer("mixtral", tmp_path, **options, max_grad_norm=clipping)
    poison = Poison(what)
    trainer.add_callback(poison)
    match = (
        rf"The {what if what == 'loss' else 'norm of the gradient'} is nan at step 2; resume from .*checkpoint-2, with"
    )
    with pytest.raises(RuntimeError, match=match):
        trainer.train()
    assert all(torch.equal(value, poison.kept[key]) for key, value in trainer.model.named_parameters())
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    again = make_trainer("mixtral", tmp_path, **options, rows=make_rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 5
