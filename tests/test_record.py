"""The record of what was done to a model: JSON in and out, steps and costs in order, the file beside the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import batches
from merged import example

from hf_mcsmoe import LoSparseConfig, MergeConfig, RepairConfig, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.record import (
    Base,
    Calibration,
    Costs,
    Predicted,
    Quality,
    Record,
    SizeChoice,
    Step,
    Stored,
    json_text,
)
from hf_mcsmoe.tables import layer_rows, quality_rows, size_lines

BEFORE, SMALL = Costs(100, 400, 420, 9.5, {"a": 2.0}, 3.0), Costs(50, 200, 210)
PLAN = {"model": "me/base", "layers": {"a": {"expert_map": [0, 0], "dominant": [1], "weights": [0.5, 0.5]}}}
RECORD = Record(
    Base("me/base", "mixtral", {"license": "mit"}, ["en"]),
    "AutoModelForCausalLM",
    PLAN,
    (Step("Repair", {"ridges": [1.0]}, ["Done.", "Well."], {"error": [0.5]}), Step("Distillation")),
    {"before": BEFORE, "merged": SMALL},
    "---\ntags: []\n---\n\n# Ünicode\n",
    {"original": Quality(2.5, 0.0), "merged": Quality(None, 0.25)},
    "merged",
    Calibration(["me/data"], 16, 2, ["me/other"], 4),
    layers={"a": Stored(2, 1, "merge", {"down_proj": 8}, {"down_proj": 4.5}, 96)},
    size=SizeChoice(
        420,
        300,
        299,
        {"a": 0.1, "b": 0.05},
        checked={"mixture": 0.125, "all at 4 bits": 0.25},
        ladder=[Predicted("chosen", 299, 0.15)],
    ),
)


def test_a_record_is_read_as_it_was_written() -> None:
    text = RECORD.to_json()
    assert Record.from_json(text, json.loads(RECORD.plan_json())) == RECORD
    content = json.loads(text)
    base = {"name": "me/base", "model_type": "mixtral", "licence": {"license": "mit"}, "language": ["en"]}
    assert content["base"] == base
    told = {"title": "Repair", "options": {"ridges": [1.0]}, "lines": ["Done.", "Well."], "figures": {"error": [0.5]}}
    assert content["steps"][0] == told
    del content["steps"][0]["figures"]
    assert not Record.from_json(json.dumps(content)).steps[0].figures, (
        "a record that was written before there were any"
    )
    assert content["costs"]["before"]["bytes_on_disk"] == 420
    assert "plan" not in content, "it has a file of its own"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("base"),
        lambda content: content.update(format="other"),
        lambda content: content.update(format_version=99),
        lambda content: content.update(format_version=None),
        lambda content: content["costs"].update(before={"weight": 1}),
        lambda content: content.update(steps=[1]),
        lambda content: content.update(card=None),
        lambda content: content.update(judged=5),
        lambda content: content["base"].update(name=5),
        lambda content: content["base"].update(language=[None]),
        lambda content: content["steps"][0].update(figures=True),
        lambda content: content["steps"][0].update(lines="text"),
        lambda content: content["costs"]["before"].update(bytes_on_disk="x"),
        lambda content: content["costs"]["before"].update(parameters=True),
        lambda content: content["costs"]["before"].update(expert_macs_per_token={"a": float("nan")}),
        lambda content: content.update(quality={"before": {"kl": []}}),
        lambda content: content.update(calibration={"rows": 1.5}),
        lambda content: content["layers"]["a"].update(bits={"down_proj": "4"}),
        lambda content: content["layers"]["a"].pop("before"),
        lambda content: content.update(size=[]),
        lambda content: content["size"].update(asked=0.5),
        lambda content: content["size"].update(predicted={"a": None}),
    ],
)
def test_what_is_no_record_is_refused(change: Any) -> None:
    content = json.loads(RECORD.to_json())
    change(content)
    for text in (json.dumps(content), "[]", "{", ""):
        with pytest.raises(ValueError, match="no record") as error:
            Record.from_json(text)
        assert "Error" not in str(error.value)


def test_a_step_that_is_done_again_comes_last() -> None:
    again = RECORD.with_step(Step("Repair", {}, ["Better."])).with_step(Step("Export"))
    assert [step.title for step in again.steps] == ["Distillation", "Repair", "Export"]
    assert again.steps[1].lines == ["Better."]
    assert [step.title for step in RECORD.steps] == ["Repair", "Distillation"]


def test_a_record_of_before_there_was_quality_is_read_and_a_later_step_takes_the_judgement_back() -> None:
    content = json.loads(RECORD.to_json())
    for key in ("quality", "judged", "calibration", "layers", "size"):
        del content[key]
    old = Record.from_json(json.dumps(content), RECORD.plan)
    assert (old.quality, old.judged, old.calibration.rows, old.layers, old.size) == ({}, "", 0, {}, None)
    again = old.with_quality(RECORD.quality)
    assert again.judged == "merged"
    assert (again.with_step(Step("Distillation")).judged, again.quality) == ("", RECORD.quality)
    assert quality_rows(RECORD.quality) == [
        ["", "original", "merged"],
        ["loss", "2.5", ""],
        ["KL to the original", "0", "0.25"],
    ]


def test_present_costs_take_the_place_of_the_last_ones_where_they_differ() -> None:
    less = Costs(40, 160)
    assert RECORD.with_present_costs(less).costs == {"before": BEFORE, "after": less}
    assert RECORD.with_present_costs(less, "distilled").costs == {"before": BEFORE, "distilled": less}
    assert RECORD.with_present_costs(Costs(50, 200)) == RECORD, "what a forward told still holds"
    for known in ({}, {"before": BEFORE}):
        assert replace(RECORD, costs=known).with_present_costs(less).costs == known, "nothing to compare with"


ENTRY = {"num_experts": 4, "expert_map": [0, 1, 1, 2]}
MIXED = {"up_proj": {"bits": [4, 4, 2], "group_size": 32}, "down_proj": {"bits": 8, "group_size": 32}}


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (ENTRY, ["4", "3", "merging", "", ""]),
        ({"num_experts": 2, "expert_map": [0, 1]}, ["2", "2", "", "", ""]),
        ({"num_experts": 4, "kept": [1, 3]}, ["4", "2", "pruning", "", ""]),
        ({"num_experts": 2, "kept": [0, 1]}, ["2", "2", "", "", ""]),
        (ENTRY | {"low_rank": {"up_proj": {"rank": 8}, "down_proj": {"rank": 8}}}, ["4", "3", "merging", "8", ""]),
        (ENTRY | {"quantized": MIXED}, ["4", "3", "merging", "", "3.33333 / 8"]),
    ],
)
def test_what_the_configuration_says_of_a_layer_is_a_row(entry: dict[str, Any], row: list[str]) -> None:
    others = {
        "full": Stored(9, 2, "prune", {"w": 1}, {"w": 2}),
        "merged": Stored(9, 3, "merge"),
    }
    head, found, *rows = layer_rows({"mine": Stored.of(entry)} | others)
    assert head == ["layer", "experts before", "after", "by", "rank", "bits"], "no bytes are known"
    assert found == ["mine", *row]
    assert rows == [["full", "9", "2", "pruning", "1", "2"], ["merged", "9", "3", "merging", "", ""]]
    assert layer_rows({"merged": others["merged"]})[0] == ["layer", "experts before", "after"]


def test_a_size_is_told_with_what_it_costs_predicted_and_measured() -> None:
    assert RECORD.size is not None
    assert size_lines(RECORD.size, 0.125) == [
        "299 of the 420 bytes of the original's weights; asked for: 300.",
        "KL to the original: predicted 0.15, measured 0.125.",
        "Compared at this size on held-out rows, of which mixture was taken: mixture 0.125, all at 4 bits 0.25.",
    ]
    alone = SizeChoice(420, 300, 299, reason="Bits come first.")
    assert size_lines(alone, None)[1:] == ["Bits come first."]
    assert size_lines(replace(alone, predicted={"a": 0.5}), None)[-1].endswith("predicted 0.5, not measured.")


def test_json_text_has_a_line_for_each_list() -> None:
    value = {"a": {"b": [1, 2], "c": {}}, "d": "é", "e": None}
    text = json_text(value)
    assert json.loads(text) == value
    assert text.splitlines() == ["{", '  "a": {', '    "b": [1, 2],', '    "c": {}', "  },", '  "d": "\\u00e9",'] + [
        '  "e": null',
        "}",
    ]


def test_a_saved_model_has_its_record_beside_it(tmp_path: Path) -> None:
    base, data = example("mixtral").base, batches("mixtral", example("mixtral").base, number=16)
    low_rank, repair = LoSparseConfig(rank=2, keep=0.25), RepairConfig(method="local", steps=10)
    model = compress(base, data, MergeConfig(experts=4, budget="uniform"), repair=repair, low_rank=low_rank)
    model.save_pretrained(tmp_path / "small")
    written = json.loads((tmp_path / "small" / "mcsmoe_record.json").read_text())
    assert (written["base"]["model_type"], written["auto_class"]) == ("mixtral", "AutoModelForCausalLM")
    assert [(step["title"], step["options"].get("rank")) for step in written["steps"]] == [
        ("Repair", None),
        ("Low rank + sparse", 2),
    ]
    assert written["steps"][0]["options"]["steps"] == 10
    assert list(written["costs"]) == ["before", "merged", "compressed"]
    sizes = [costs["parameters"] for costs in written["costs"].values()]
    assert sizes[0] == base.num_parameters() > sizes[1] > sizes[2] == model.num_parameters()
    on_disk = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert written["costs"]["compressed"]["bytes_on_disk"] == on_disk
    loaded = record_of(type(model).from_pretrained(tmp_path / "small"))
    told = model.mcsmoe_record
    assert (loaded.base, loaded.plan, loaded.steps) == (told.base, told.plan, told.steps)
    assert len(loaded.plan["layers"]) == 4
    assert replace(loaded.costs["compressed"], bytes_on_disk=0) == replace(told.costs["compressed"], bytes_on_disk=0)
