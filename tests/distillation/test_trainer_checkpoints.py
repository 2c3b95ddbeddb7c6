"""Resuming: what no checkpoint of this model is, is refused before anything is loaded; NaN and the last good one."""

import copy
import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilled import make_rows, make_student, make_trainer
from families import build
from merged import example, merge
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback

from hf_mcsmoe import LoSparseConfig, SparsificationCallback, compact, decompose_experts
from hf_mcsmoe.distillation.checkpoints import check_checkpoint, last_checkpoint, resumable_flaw, train_or_resume
from hf_mcsmoe.distillation.fingerprints import sample_fingerprint
from hf_mcsmoe.distillation.seal import SEAL

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


class Draws(TrainerCallback):
    """Lets each step depend on the random numbers, as dropout does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(1e-3 * torch.randn_like(model.lm_head.weight))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the merged model for three steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("mixtral", folder, max_steps=3, callbacks=[Draws()]).train()
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train low rank + sparse experts for a step."""
    folder = tmp_path_factory.mktemp("pruned")
    callbacks = [SparsificationCallback(0.25, start=0, end=0)]
    make_trainer("mixtral", folder, model=_low_rank(2), max_steps=1, callbacks=callbacks).train()
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
    trainer = make_trainer("mixtral", tmp_path)
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (folder / SEAL).unlink()
    for resume in (True, str(folder)):
        with pytest.raises(ValueError, match=r"No run goes on from .*checkpoint-1: it was not written to its end"):
            trainer.train(resume_from_checkpoint=resume)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "is missing|has no mcsmoe_checkpoint.json"),
    "empty": (lambda file: file.write_bytes(b""), "has 0 bytes instead of [0-9,]+|json is damaged"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "bytes instead of|json is damaged"),
    "another": (
        lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
        "damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["checkpoint", "with_adapters", "pruned"])
def test_each_file_of_a_checkpoint_is_checked(
    kind: str, damage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = request.getfixturevalue(kind)
    weights = "adapter_model.safetensors" if kind == "with_adapters" else "model.safetensors"
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json", SEAL, weights}
    needed |= {"sparsification.json", "sparsification.safetensors"} if kind == "pruned" else set()
    assert needed <= set(_files(whole))
    folder = shutil.copytree(whole, tmp_path / whole.name)
    assert not resumable_flaw(folder)
    for name in _files(whole):
        change, message = DAMAGES[damage]
        change(folder / name)
        found = resumable_flaw(folder)
        if name == "README.md":  # which a person may edit
            assert not found
        else:
            assert re.search(rf"No run goes on from .*{whole.name}: .*({message})", found), name
            assert last_checkpoint(tmp_path).path is None
            assert last_checkpoint(tmp_path).damaged == (name != SEAL or damage != "missing")
        shutil.copy2(whole / name, folder / name)


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth"])
def test_a_run_goes_on_from_the_last_whole_checkpoint_to_the_same_weights(
    file: str, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / file).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    trainer = make_trainer("mixtral", tmp_path / "run", max_steps=3)
    trainer.add_callback(Draws())
    with pytest.warns(UserWarning, match=rf"No run goes on from .*checkpoint-2: {file} is missing"):
        trainer.train(resume_from_checkpoint=True)
    whole, again = (load_file(folder / "checkpoint-3" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_a_run_that_has_no_optimizer_saved_is_not_resumed(tmp_path: Path) -> None:
    make_trainer("mixtral", tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="saved without optimizer and random state"):
        make_trainer("mixtral", tmp_path).train(resume_from_checkpoint=True)


OTHER_ROWS = [{**row, "input_ids": row["input_ids"].flip(0)} for row in make_rows()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": OTHER_ROWS}, "data: 8 rows .* before, 8 rows .* now"),
        ({"rows": make_rows()[:7]}, "data: 8 rows .* before, 7 rows .* now"),
        ({"seed": 1}, "seed: 42 before, 1 now"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 before, 2 now"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 before, 2 now"),
        ({"teacher": "merged"}, "teacher: .* before, .* now"),
    ],
    ids=["rows", "fewer rows", "seed", "batch size", "accumulation", "teacher"],
)
def test_a_run_of_other_rows_or_another_teacher_does_not_go_on(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    given = {"teacher": example("mixtral").merged} if "teacher" in options else {}
    trainer = make_trainer("mixtral", tmp_path, **options | given)
    with pytest.raises(ValueError, match=rf"checkpoint-1 is of another run \({message}\)"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_adapters_beside_other_weights_do_not_go_on(with_adapters: Path, tmp_path: Path) -> None:
    model = make_student("mixtral")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    trainer = make_trainer("mixtral", tmp_path, model=model, **LORA)
    with pytest.raises(ValueError, match=r"is of another run .*frozen weights: "):
        trainer.train(resume_from_checkpoint=str(with_adapters))


def test_other_arguments_are_warned_of(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer("mixtral", tmp_path, kd_weight=0.5, weight_decay=0.0)
    match = r"weight_decay: 0.01 before, 0.0 now, max_steps: 1 before, 2 now|kd_weight: 0.2 before, 0.5 now"
    with pytest.warns(UserWarning, match=match):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_rows_that_are_drawn_anew_say_nothing_about_a_run_and_cost_no_randomness() -> None:
    class Drawn(list):
        def __getitem__(self, number: Any) -> Any:
            return {"input_ids": [random.random(), float(torch.rand(())), float(np.random.rand())]}

    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    model = example("mixtral").merged
    assert sample_fingerprint(Drawn([1, 2]), model) == ""
    drawn = Drawn([1])[0]["input_ids"]
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    assert Drawn([1])[0]["input_ids"] == drawn
    assert sample_fingerprint([{"input_ids": [1]}], model) == sample_fingerprint(
        [{"input_ids": torch.ones(1).long()}], model
    )
    assert sample_fingerprint(iter([]), model) == ""


def test_an_old_checkpoint_goes_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer("mixtral", tmp_path, max_steps=3, save_total_limit=1, callbacks=[Killed()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(tmp_path).path == tmp_path / "checkpoint-1"
    again = make_trainer("mixtral", tmp_path, max_steps=3, save_total_limit=1)
    with pytest.warns(UserWarning, match="checkpoint-2: it was not written to its end"):
        again.train(resume_from_checkpoint=True)
    assert _files(tmp_path) == ["checkpoint-3"]
    assert torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_last_begins_anew_only_where_nothing_is_lost(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing\. Start without resume_from_checkpoint"):
        train_or_resume(make_trainer("mixtral", tmp_path, resume_from_checkpoint="last"))
    (folder / SEAL).unlink()
    trainer = make_trainer("mixtral", tmp_path, max_steps=1, resume_from_checkpoint="last")
    with pytest.warns(UserWarning, match="it was not written to its end"):
        train_or_resume(trainer)
    assert trainer.state.global_step == 1


def test_the_best_checkpoint_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "train_loss" in logs:  # the last log, before the best weights are loaded
                (Path(state.best_model_checkpoint) / "model.safetensors").write_bytes(b"")

    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_only_model": True}
    trainer = make_trainer("mixtral", tmp_path, **options, eval_dataset=make_rows(), callbacks=[Breaks()])
    with pytest.warns(UserWarning, match=r"The best checkpoint .* is not loaded: model\.safetensors has 0 bytes"):
        trainer.train()


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
        told = pytest.warns(UserWarning, match=r"learning_rate: 0.01 before, 0.004 now") if start else nullcontext()
        with told:
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
    again = make_trainer("mixtral", tmp_path, **options, max_grad_norm=clipping, rows=make_rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 5
