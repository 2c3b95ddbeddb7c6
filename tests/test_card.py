"""The card: rendered from the record once, and left alone where somebody has written in it; it never stops a save."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distilled import make_trainer
from helpers import batches, costs_on_card, logits
from huggingface_hub import ModelCard
from merged import example, run_python
from transformers import AutoModelForCausalLM

from hf_mcsmoe import LoSparseConfig, MergeConfig, RepairConfig, attached, card, compress
from hf_mcsmoe.record import Base, Costs, Quality, Record, SizeChoice, Step, Stored

START, END = "<!-- mcsmoe -->", "<!-- /mcsmoe -->"


def test_all_of_a_record_is_in_its_card() -> None:
    plan = {
        "versions": {"hf_mcsmoe": "1.2.3"},
        "tokens": {"one": 1234, "two": 1200, "three": 1},
        "config": {"experts": 0.5, "similarity": "router_logits", "budget": "mine", "reference": "first"},
        "layers": {"one": {"expert_map": [0, 1, 0], "dominant": [2, 1]}, "two": {"expert_map": [0], "dominant": [0]}},
    }
    steps = (Step("Repair", {}, ["Line 1", "", "Line 2"]), Step("Sparsity", {}, ["Half."]))
    costs = {"before": Costs(2000, 8000, 8100, 500.0), "after": Costs(500, 2000)}
    base = Base("team/base-model", "mixtral", {"license": "mit"})
    text = card.render(Record(base, "AutoModelForCausalLM", plan, steps, costs))
    found = ModelCard(text)
    assert (found.data.base_model, found.data.license, found.data.pipeline_tag) == (
        "team/base-model",
        "mit",
        "text-generation",
    )
    lines = text.splitlines()
    for line in ("# base-model with merged experts", "| `one` | 3 | 2 |", "| `two` | 1 | 1 |", "Left whole: `three`."):
        assert line in lines
    assert "| similarity | router_logits |" in text
    assert "| budget | mine |  |" in lines
    assert "| experts kept | 50% |  |" in lines
    assert "Calibrated on 1,234 tokens." in text
    assert "`hf_mcsmoe` 1.2.3" in text
    table = costs_on_card(text)
    assert table["parameters"] == ["2,000", "500", "75.0%"]
    assert table["FLOPs per token"] == ["500", "", ""]
    assert table["bytes on disk"] == ["8,100", "@BYTES_ON_DISK@", "@SAVED@"]
    titles = [line for line in lines if line.startswith("## ")]
    assert titles[-3:] == ["## Repair", "## Sparsity", "## Citation"]
    assert "## Repair\n\nLine 1\n\nLine 2\n" in text
    assert text.count(START) == text.count(END) == 1


def test_a_record_of_little_has_a_card_of_little() -> None:
    text = card.render(Record(Base("", "mixtral")))
    assert "# mixtral with merged experts" in text.splitlines()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## How to load",
        "## Use it with",
        "## Citation",
    ]


MERGED, PRUNED, KEPT = Stored(8, 4, "merge"), Stored(8, 6, "prune"), Stored(8, 8)
FOUR, MIXED = {"down_proj": 4}, {"down_proj": 3.5, "up_proj": 8}
FIRST_WORDS = {
    "merged": ([MERGED, KEPT], "with merged experts", ["experts of each layer were merged by **M-SMoE**"]),
    "pruned": ([PRUNED, KEPT], "with pruned experts", ["of each layer that are missed least were pruned by"]),
    "both": (
        [MERGED, MERGED, PRUNED],
        "with merged and pruned experts",
        ["experts of 2 layers were merged", "In one layer experts were pruned instead"],
    ),
    "few bits": (
        [replace(KEPT, bits=FOUR)],
        "with experts in few bits",
        ["none were merged", "Experts are stored in 4 bits a weight."],
    ),
    "bits and fewer": (
        [replace(MERGED, bits=MIXED), KEPT],
        "with merged experts",
        ["Experts are stored in 3.5 to 8 bits a weight (1 of 2 layers as they were)."],
    ),
}


@pytest.mark.parametrize("case", FIRST_WORDS)
def test_a_card_begins_with_what_became_of_the_experts(case: str) -> None:
    layers, title, told = FIRST_WORDS[case]
    named = {f"layer.{number}": layer for number, layer in enumerate(layers)}
    text = card.render(Record(Base("", "mixtral"), layers=named))
    assert f"# mixtral {title}" in text.splitlines()
    first = " ".join(text.partition("## ")[0].split())
    assert all(words in first for words in told), first
    assert ("pruned" in first, "merged by" in first) == (
        any(layer.reduce == "prune" for layer in layers),
        any(layer.reduce == "merge" for layer in layers),
    )
    in_bits = any(layer.bits for layer in layers)
    assert ("Int8WeightOnlyConfig" in text, "are in few bits already" in text) == (not in_bits, in_bits)
    assert text.count("| `layer.") == len(layers)


def test_a_card_of_a_model_of_its_familys_own_class_asks_for_no_remote_code() -> None:
    own, plain = (card.render(Record(Base("", "mixtral"), is_plain=is_plain)) for is_plain in (False, True))
    for words in ("trust_remote_code", "custom_code", "modelling code lies beside"):
        assert words in own
        assert words not in plain
    assert "no further code or package is needed" in plain


def test_a_card_tells_the_size_that_was_asked_for_with_both_divergences() -> None:
    size = SizeChoice(400, 200, 199, {"a": 0.25}, reason="Experts are alike.")
    quality = {"original": Quality(2.0, 0.0), "merged": Quality(2.5, 0.5)}
    record = Record(Base("", "mixtral"), size=size).with_quality(quality)
    told = card.render(record).partition("## Size\n")[2].partition("##")[0]
    assert "199 of the 400 bytes" in told
    assert "Experts are alike." in told
    assert "predicted 0.25, measured 0.5" in told
    assert "## Size" not in card.render(Record(Base("", "mixtral")))


def test_the_advice_on_torchao_is_for_dense_experts() -> None:
    dense = card.render(Record(Base("", "mixtral"), steps=(Step("Repair"),)))
    stored = card.render(Record(Base("", "mixtral"), steps=(Step("Repair"), Step("Low rank + sparse"))))
    assert ["Int8WeightOnlyConfig" in text for text in (dense, stored)] == [True, False]
    assert "**torchao** has no recipe" in stored


def test_one_compression_renders_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    base, rendered = example("mixtral").base, []
    render = card.render
    monkeypatch.setattr(attached, "render", lambda record: rendered.append(record) or render(record))
    data = batches("mixtral", base, number=16)
    config = MergeConfig(experts=4, budget="uniform")
    repair, low_rank = RepairConfig(method="local", steps=5), LoSparseConfig(rank=2, keep=0.25)
    model = compress(base, data, config, repair=repair, low_rank=low_rank)
    assert len(rendered) == 1
    assert model.mcsmoe_record.card == render(rendered[0])


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "merged"
    example("mixtral").merged.save_pretrained(folder)
    return folder


def _between(text: str) -> str:
    return text.partition(START)[2].partition(END)[0]


def _written_around(folder: Path) -> None:
    text = (folder / "README.md").read_text().replace("tags:\n", "license: apache-2.0\ntags:\n")
    text = text.replace(START, f"Hello, é.\r\n\n{START}") + "\n## My results\n\n| a | b |\n"
    (folder / "README.md").write_bytes(text.encode())


def _rewritten(folder: Path) -> None:
    (folder / "README.md").write_text("# All mine\n\n| parameters | 1 |\n<!-- costs -->\n")


def _half_marked(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(END + text.replace(END, ""))


def _binary(folder: Path) -> None:
    (folder / "README.md").write_bytes(bytes(range(256)) * 3)


def _broken_metadata(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n  : :\n---\n# Broken\n")


def _deleted(folder: Path) -> None:
    (folder / "README.md").unlink()


def _directory(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()


EDITS: dict[str, Callable[[Path], None]] = {
    "written around": _written_around,
    "rewritten": _rewritten,
    "half marked": _half_marked,
    "binary": _binary,
    "broken metadata": _broken_metadata,
    "deleted": _deleted,
    "a directory": _directory,
}


def _edited(merged: Path, edit: str, target: Path) -> tuple[Path, bytes | None]:
    """Return a copy of a saved model whose card somebody has edited, and that card."""
    folder = shutil.copytree(merged, target / "mine")
    EDITS[edit](folder)
    return folder, (folder / "README.md").read_bytes() if (folder / "README.md").is_file() else None


def _check_left_alone(edit: str, before: bytes | None, saved: Path, *, told: str) -> None:
    """Check a card that was saved anew: the marked section says `told`, and all else is as it was."""
    if before is None:
        assert not (saved / "README.md").exists()
        return
    after = (saved / "README.md").read_bytes()
    if edit != "written around":
        assert after == before
        return
    ours, theirs = (text.decode() for text in (after, before))
    assert ours.replace(_between(ours), "") == theirs.replace(_between(theirs), "")
    assert f'from_pretrained("{saved.name}"' in _between(ours)
    assert told in _between(ours)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert costs_on_card(ours)["bytes on disk"][-2] == f"{size:,}"


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_card_stops_no_training_and_is_left_alone(edit: str, merged: Path, tmp_path: Path) -> None:
    folder, before = _edited(merged, edit, tmp_path)
    student = AutoModelForCausalLM.from_pretrained(folder)
    trainer = make_trainer("mixtral", tmp_path / "run", model=student, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for saved in (tmp_path / "run" / "checkpoint-1", tmp_path / "final"):
        _check_left_alone(edit, before, saved, told="Trained for 1 steps")
        record = json.loads((saved / "mcsmoe_record.json").read_text())
        assert [step["title"] for step in record["steps"]] == ["Distillation"]


SAVE = """
import sys, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-again", max_shard_size="100KB")
assert "hf_mcsmoe" not in sys.modules
"""


@pytest.mark.slow
def test_an_edited_card_is_left_alone_without_the_package(merged: Path, tmp_path: Path) -> None:
    cases = {}
    for number, edit in enumerate(EDITS):
        (tmp_path / str(number)).mkdir()
        cases[edit] = _edited(merged, edit, tmp_path / str(number))
    done = run_python(["-c", SAVE, *(str(folder) for folder, _ in cases.values())], tmp_path)
    assert done.returncode == 0, done.stderr
    for edit, (folder, before) in cases.items():
        again = folder.with_name("mine-again")
        _check_left_alone(edit, before, again, told="## Experts per layer")
        record = json.loads((again / "mcsmoe_record.json").read_text())
        on_disk = sum(file.stat().st_size for file in again.glob("*.safetensors"))
        assert list(record["costs"].values())[-1]["bytes_on_disk"] == on_disk
        assert (again / "mcsmoe_plan.json").read_bytes() == (folder / "mcsmoe_plan.json").read_bytes()


@pytest.mark.parametrize("text", ["{", '{"format": "mcsmoe-record"}', '{"card": 1, "costs": []}', "[1]", "\0"])
def test_a_damaged_record_stops_no_save(text: str, merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "mine")
    (folder / "mcsmoe_record.json").write_text(text)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "mcsmoe_record.json").read_text() == text
    assert (tmp_path / "again" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    with pytest.warns(UserWarning, match=r"mcsmoe_record\.json is damaged"):
        record = attached.record_of(loaded)
    assert len(record.plan["layers"]) == 4


def test_a_folder_of_before_goes_on_without_its_card_being_touched(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "mine")
    (folder / "mcsmoe_record.json").unlink()
    old = (folder / "README.md").read_text().replace(START, "").replace(END, "")
    (folder / "README.md").write_text(old)
    student = AutoModelForCausalLM.from_pretrained(folder)
    student.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "mcsmoe_record.json").exists()
    trainer = make_trainer("mixtral", tmp_path / "run", model=student, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "README.md").read_text() == (tmp_path / "again" / "README.md").read_text() == old
    written = json.loads((tmp_path / "final" / "mcsmoe_record.json").read_text())
    assert (written["base"]["model_type"], [step["title"] for step in written["steps"]]) == (
        "mixtral",
        ["Distillation"],
    )
    assert (tmp_path / "final" / "mcsmoe_plan.json").read_bytes() == (folder / "mcsmoe_plan.json").read_bytes()


def test_tags_that_a_broken_card_cannot_take_are_a_warning(merged: Path, tmp_path: Path) -> None:
    folder, before = _edited(merged, "broken metadata", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"\['mine'\] are not in README\.md"):
        loaded.save_pretrained(tmp_path / "again", tags="mine")
    assert (tmp_path / "again" / "README.md").read_bytes() == before
    batch = example("mixtral").batch
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(loaded, batch))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_card_that_was_edited_where_a_model_is_saved_again_keeps_what_a_person_wrote(
    loaded: bool, merged: Path, tmp_path: Path
) -> None:
    folder, before = _edited(merged, "written around", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(merged) if loaded else example("mixtral").merged
    model.save_pretrained(folder)
    _check_left_alone("written around", before, folder, told="## Experts per layer")


def test_a_card_beside_no_model_is_left_alone_and_one_that_nobody_edited_is_replaced(tmp_path: Path) -> None:
    alone, old = tmp_path / "alone", tmp_path / "old"
    alone.mkdir()
    (alone / "README.md").write_text("# Mine\n")
    example("mixtral").merged.save_pretrained(alone)
    assert (alone / "README.md").read_text() == "# Mine\n"
    example("qwen3_moe").merged.save_pretrained(old)
    example("mixtral").merged.save_pretrained(old)
    example("mixtral").merged.save_pretrained(tmp_path / "new" / "old")
    assert (old / "README.md").read_text() == (tmp_path / "new" / "old" / "README.md").read_text()


def test_a_plan_that_cannot_be_read_is_not_written_over(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "mine")
    text = (folder / "mcsmoe_plan.json").read_text()[:-20]
    (folder / "mcsmoe_plan.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"mcsmoe_plan\.json is damaged"):
        attached.attach_record(model, attached.record_of(model))
    model.save_pretrained(folder)
    assert (folder / "mcsmoe_plan.json").read_text() == text


def test_a_model_whose_source_is_gone_says_what_it_is_saved_without(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match=r"mine'.*without the tokenizer, plan, record and card"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
