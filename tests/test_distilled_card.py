"""The card and the push of a distilled model, whether it was merged in this process or loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
from distilled import make_rows, make_student, make_trainer
from helpers import batches, costs_on_card
from hub import running_hub
from huggingface_hub import HfApi, constants
from merged import example
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mcsmoe import LoSparseConfig, SparsificationCallback, compact, compress, decompose_experts
from hf_mcsmoe.accounting import account
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.model_card import add_to_card, describe_costs


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


def test_a_longer_table_of_costs_keeps_its_columns() -> None:
    student = make_student("mixtral")
    accounts = {"teacher": account(example("mixtral").base), "student": account(student), "before": account(student)}
    describe_costs(student, accounts)
    add_to_card(student, "Distillation", "Done.")
    found = next(line for line in student.mcsmoe_files["README.md"].splitlines() if line.startswith("| parameters |"))
    old, new = example("mixtral").base.num_parameters(), student.num_parameters()
    assert found == f"| parameters | {old:,} | {new:,} | {new:,} | {1 - new / old:.1%} |"


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


@pytest.mark.parametrize("parts", ["all", "lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_the_trainer_pushes_loads_from_the_start(parts: str, hub: Any, tmp_path: Path) -> None:
    pushed: list[set[str]] = []
    options = {"push_to_hub": True, "hub_model_id": "me/distilled", "hub_always_push": True, "train_parts": parts}
    trainer = make_trainer("mixtral", tmp_path / "out", **options, rows=make_rows())
    trainer.train()
    trainer._finish_current_push()
    pushed.append(set(hub.files["me/distilled"]))
    trainer.push_to_hub()
    pushed.append(set(hub.files["me/distilled"]))
    needed = {"README.md", "config.json", "modeling_mcsmoe.py", "saving_mcsmoe.py", "model.safetensors"}
    assert pushed[0] >= needed if parts == "all" else not pushed[0] & needed
    assert pushed[1] >= needed | {"mcsmoe_plan.json"}
    assert "adapter_config.json" not in pushed[1]
    for name, content in hub.files["me/distilled"].items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "pulled").named_parameters())
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((loaded[key] == value).all()) for key, value in saved.items())
    assert "## Distillation\n\nTrained for 2 steps" in (tmp_path / "pulled" / "README.md").read_text()
