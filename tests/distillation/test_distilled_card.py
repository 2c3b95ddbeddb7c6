"""The card and the push of a distilled model, whether it was merged in this process or loaded."""

import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_rows, make_student, make_trainer
from helpers import batches, costs_on_card
from hub import running_hub
from huggingface_hub import HfApi, constants
from merged import example
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from hf_mcsmoe import LoSparseConfig, SparsificationCallback, compact, compress, decompose_experts
from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.layers.loading import load_model


def sizes_on_card(card: str) -> dict[str, list[str]]:
    """Return the cells of the table of costs by their row."""
    found = re.findall(r"^\| (parameters|bytes) \| ([\d,]+) \| ([\d,]+) \| ([\d.-]+%) \|$", card, flags=re.MULTILINE)
    return {label: cells for label, *cells in found}


def check_card(folder: Path, steps: int) -> None:
    """Check a saved card against the model beside it."""
    card, loaded, base = (folder / "README.md").read_text(), AutoModelForCausalLM.from_pretrained(folder), None
    base = example("mixtral").base
    assert card.count("## Distillation\n") == 1
    assert f"## Distillation\n\nTrained for {steps} steps" in card
    assert card.index("## Experts per layer") < card.index("## Distillation") < card.index("## Citation")
    assert f'from_pretrained("{folder.name}", trust_remote_code=True)' in card
    for label, before, after in (
        ("parameters", base.num_parameters(), sum(value.numel() for value in loaded.parameters())),
        ("bytes", *(sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in (base, loaded))),
    ):
        assert sizes_on_card(card)[label] == [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"]
    assert (folder / "mcsmoe_plan.json").read_text() == example("mixtral").plan.to_json()


@pytest.mark.parametrize("form", ["dense", "decomposed"])
def test_a_loaded_model_goes_on_with_its_card(form: str, tmp_path: Path) -> None:
    student: PreTrainedModel = make_student("mixtral")
    if form == "decomposed":
        decompose_experts(student, LoSparseConfig(rank=2, keep=0.25))
    source = tmp_path / "merged"
    if form == "dense":
        student.save_pretrained(source)
        student = AutoModelForCausalLM.from_pretrained(source)
    for number, steps in enumerate((1, 2)):
        trainer = make_trainer("mixtral", tmp_path / "run", model=student, max_steps=steps, save_strategy="no")
        trainer.train()
        target = tmp_path / f"distilled-{number}"
        if form == "decomposed" and number == 0:
            with pytest.warns(UserWarning, match="pruned by magnitude"):
                trainer.save_model(target)
        else:
            trainer.save_model(target)
        check_card(target, steps)
        student = AutoModelForCausalLM.from_pretrained(target)
    trainer = make_trainer("mixtral", tmp_path / "run", model=student, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(target)  # over what it was loaded from
    check_card(target, 1)


# What a person, or a half-written disk, may have made of the files beside the weights.
EDITED: dict[str, list[tuple[str, bytes]]] = {
    "metadata": [("README.md", b"---\ntags: 3\nmodel-index: x\nlicense: [1]\n---\n# Mine\n")],
    "no text": [("README.md", b"\xff\xfe\x00"), ("mcsmoe_plan.json", b"\xff")],
    "half a record": [("mcsmoe_record.json", b'{"format": "mcsmoe-rec')],
    "odd steps": [("mcsmoe_record.json", b'{"format": "mcsmoe-record", "format_version": 1, "steps": 3}')],
    "a list": [("mcsmoe_record.json", b"[1]"), ("mcsmoe_plan.json", b"[1]")],
}


@pytest.mark.filterwarnings("ignore:.* is damaged and not used")
@pytest.mark.parametrize("edit", EDITED)
def test_a_training_is_not_lost_to_what_became_of_the_card(edit: str, merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "mine")
    for name, content in EDITED[edit]:
        (folder / name).write_bytes(content)
    student = AutoModelForCausalLM.from_pretrained(folder)
    trainer = make_trainer("mixtral", tmp_path / "run", model=student, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in trainer.student.state_dict().items())
    if "README.md" in dict(EDITED[edit]):
        assert (tmp_path / "out" / "README.md").read_bytes() == dict(EDITED[edit])["README.md"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the merged model."""
    folder = tmp_path_factory.mktemp("source") / "merged"
    make_student("mixtral").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trained", [True, False])
def test_figures_that_no_longer_hold_are_renewed_or_gone(trained: bool, tmp_path: Path) -> None:
    base = example("switch_transformers").base
    compress(base, batches("switch_transformers", base)).save_pretrained(tmp_path / "merged")
    old = costs_on_card((tmp_path / "merged" / "README.md").read_text())
    assert old["FLOPs per token"][1]
    student = decompose_experts(load_model(str(tmp_path / "merged")), LoSparseConfig(rank=2, keep=0.25))
    if trained:
        callbacks = [SparsificationCallback(0.25, start=1, end=1)]
        options = {"model": student, "max_steps": 4, "save_strategy": "no", "callbacks": callbacks}
        trainer = make_trainer("switch_transformers", tmp_path / "run", **options)
        trainer.train()
        trainer.save_model(tmp_path / "small")
    else:
        with pytest.warns(UserWarning, match="pruned by magnitude"):
            compact(student, keep=0.5)
        student.save_pretrained(tmp_path / "small")
    costs, loaded = costs_on_card((tmp_path / "small" / "README.md").read_text()), load_model(str(tmp_path / "small"))
    assert costs[""] == ["before", "after", "saved"]
    assert costs["parameters"][1] == f"{sum(value.numel() for value in loaded.parameters()):,}"
    assert costs["bytes"][1] == f"{sum(t.nbytes for t in [*loaded.parameters(), *loaded.buffers()]):,}"
    assert costs["bytes on disk"][1] == f"{(tmp_path / 'small' / 'model.safetensors').stat().st_size:,}"
    for row in ("FLOPs per token", "of them in experts"):
        assert costs[row] == [old[row][0], "", ""]


def test_more_stages_keep_their_columns() -> None:
    student = make_student("mixtral")
    whole, small = account(example("mixtral").base), account(student)
    record = replace(record_of(student), costs={"teacher": whole, "student": small, "before": replace(small)})
    attach_record(student, record)
    decompose_experts(student, LoSparseConfig(rank=2, keep=0.25))
    table = costs_on_card(student.mcsmoe_record.card)
    assert table[""] == ["teacher", "student", "after", "saved"]
    assert table["parameters"][:2] == [f"{each.parameters:,}" for each in (whole, small)]
    assert int(table["parameters"][2].replace(",", "")) < small.parameters


def test_a_model_without_a_card_is_saved_without(tmp_path: Path) -> None:
    make_student("mixtral").save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "README.md").unlink()
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trainer = make_trainer("mixtral", tmp_path, model=student, save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / "README.md").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serve a Hub that this process talks to."""
    with running_hub() as served:
        for name, value in (("ENDPOINT", served.endpoint), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        api = HfApi(endpoint=served.endpoint, token="secret")
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
        yield served


def _pull(files: dict[str, bytes], folder: Path) -> PreTrainedModel:
    """Load what lies at the top of a repository, as a user would."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("form", ["dense", "decomposed", "lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_each_push_of_the_trainer_is_a_compressed_model_with_its_card(form: str, hub: Any, tmp_path: Path) -> None:
    pushed: list[dict[str, bytes]] = []
    commit = hub.commit

    def recorded(*given: Any) -> dict[str, Any]:
        answer = commit(*given)
        pushed.append(dict(hub.files["me/distilled"]))
        return answer

    hub.commit = recorded
    options = {"push_to_hub": True, "hub_model_id": "me/distilled", "hub_always_push": True, "max_steps": 4}
    options |= {"train_parts": "lora"} if form == "lora" else {}
    student = make_student("mixtral")
    if form == "decomposed":
        decompose_experts(student, LoSparseConfig(rank=2, keep=0.25))
    trainer = make_trainer("mixtral", tmp_path / "out", model=student, **options, rows=make_rows())
    if form == "decomposed":
        trainer.add_callback(SparsificationCallback(0.25, start=2, end=1))
    trainer.train()
    assert [commit["summary"] for commit in hub.commits] == [f"Training in progress, step {n}" for n in range(1, 5)]
    trainer.push_to_hub()
    trainer.save_model(tmp_path / "final")  # pushes as well
    expected = load_file(tmp_path / "final" / "model.safetensors")
    for files, steps in zip(pushed, (1, 2, 3, 4, 4, 4), strict=True):
        found = _pull(files, tmp_path / "pulled").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()) == (steps == 4)
        kept = sum(len(value) for key, value in found.items() if key.endswith("_rows"))
        assert kept == sum(len(value) for key, value in expected.items() if key.endswith("_rows"))
        assert f"## Distillation\n\nTrained for {steps} steps" in files["README.md"].decode()
        needed = {"config.json", "modeling_mcsmoe.py", "saving_mcsmoe.py", "mcsmoe_plan.json", "model.safetensors"}
        assert files.keys() >= needed
        assert not files.keys() & {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(("strategy", "places"), [("checkpoint", ["last-checkpoint"]), ("end", [])])
def test_what_a_run_resumes_from_is_pushed_whole(strategy: str, places: list[str], hub: Any, tmp_path: Path) -> None:
    options = {"push_to_hub": True, "hub_model_id": "me/distilled", "hub_token": "secret", "hub_strategy": strategy}
    student = decompose_experts(make_student("mixtral"), LoSparseConfig(rank=2, keep=0.25))
    trainer = make_trainer("mixtral", tmp_path, model=student, **options, max_steps=3)
    trainer.add_callback(SparsificationCallback(0.25, start=1, end=1))
    trainer.train()
    local = tmp_path / "checkpoint-3"
    found = {name: content for name, content in hub.files["me/distilled"].items() if "/" in name}
    assert found == {f"{place}/{file.name}": file.read_bytes() for place in places for file in local.iterdir()}
    assert ("model.safetensors" in hub.files["me/distilled"]) == bool(places)


def test_the_last_checkpoint_is_pushed_however_slow_those_before_it(hub: Any, tmp_path: Path) -> None:
    commit, finished = hub.commit, threading.Event()

    def slow(*given: Any) -> dict[str, Any]:
        finished.wait()
        return commit(*given)

    class Finish(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                threading.Timer(0.3, finished.set).start()

    hub.commit = slow
    options = {"push_to_hub": True, "hub_model_id": "me/distilled", "max_steps": 3}
    trainer = make_trainer("mixtral", tmp_path / "out", **options)
    trainer.add_callback(Finish())
    trainer.train()
    assert [commit["summary"] for commit in hub.commits] == [f"Training in progress, step {n}" for n in (1, 3)]
    _pull(hub.files["me/distilled"], tmp_path / "pulled")
    assert "Trained for 3 steps" in (tmp_path / "pulled" / "README.md").read_text()
