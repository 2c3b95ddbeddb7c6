"""Plain checkpoints: written for the family's own class, and read by it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build, inputs
from helpers import batches, logits
from huggingface_hub import metadata_load, metadata_save
from merged import Example, example, merge
from safetensors.torch import load_file

from hf_mcsmoe import MergeConfig, QuantizationConfig, compress, moe_layers, quantize_experts
from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.export import RouterFit, export
from hf_mcsmoe.export.form import nearest_uniform
from hf_mcsmoe.record import Calibration


def uniform(name: str, experts: int | float = 0.5) -> Example:
    """Merge the tiny model of a family to one number of experts for all of its layers."""
    base = build(name)
    return Example(name, base, inputs(name, base), *merge(base, name, MergeConfig(experts=experts, budget="uniform")))


@pytest.mark.parametrize("name", ["qwen3_moe", "switch_transformers"])
def test_expanded_checkpoints_have_the_merged_models_logits_in_the_familys_own_class(
    name: str, tmp_path: Path
) -> None:
    case = uniform(name)
    export(case.merged, tmp_path / "expanded", expand=True)
    again, info = type(case.base).from_pretrained(tmp_path / "expanded", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.num_experts == case.base.config.num_experts
    torch.testing.assert_close(logits(again, case.batch), logits(case.merged, case.batch), atol=1e-4, rtol=1e-4)


def test_rows_of_a_plain_router_are_the_means_of_its_groups_by_their_frequency(tmp_path: Path) -> None:
    case = uniform("qwen3_moe")
    export(case.merged, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert not {"auto_map", "mcsmoe"} & json.loads((tmp_path / "plain" / "config.json").read_text()).keys()
    again, info = type(case.base).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values()), info
    (name, plan), *_ = case.plan.layers.items()
    router = name.replace("experts", "gate.weight")
    rows, counts = case.base.get_parameter(router), torch.tensor(plan.counts or [])
    for group in range(len(plan.dominant)):
        members = plan.members(group)
        mean = sum(counts[member] * rows[member] for member in members) / counts[members].sum()
        torch.testing.assert_close(again.get_parameter(router)[group], mean)


def test_the_log_of_a_groups_size_is_added_to_the_bias_of_its_mean_row(tmp_path: Path) -> None:
    case = uniform("gpt_oss")
    export(case.merged, tmp_path / "plain", router_rows="logsumexp")
    again = type(case.base).from_pretrained(tmp_path / "plain")
    for name, plan in case.plan.layers.items():
        router = name.replace("experts", "router")
        for part, more in (("weight", 0), ("bias", 1)):
            rows, found = (model.get_parameter(f"{router}.{part}") for model in (case.base, again))
            for group in range(len(plan.dominant)):
                members = plan.members(group)
                mean = sum(rows[member] for member in members) / len(members)
                torch.testing.assert_close(found[group], mean + more * math.log(len(members)))


def test_layers_of_unlike_numbers_of_experts_are_told_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget='uniform' and experts=4"):
        export(example("qwen3_moe").merged, tmp_path / "plain")


def test_a_folders_generation_config_goes_along(tmp_path: Path) -> None:
    merged = uniform("mixtral").merged
    merged.save_pretrained(tmp_path / "merged")
    settings = {"eos_token_id": [3, 7], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (tmp_path / "merged" / "generation_config.json").write_text(json.dumps(settings))
    export(tmp_path / "merged", tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert settings.items() <= written.items()


def test_the_card_tells_of_the_plain_model_and_of_the_rows_that_judged_it(tmp_path: Path) -> None:
    base = build("mixtral")
    rows = batches("mixtral", base, number=3)
    merged = compress(base, rows[:1], MergeConfig(experts=0.5, budget="uniform"), held_out=rows[1:2])
    attach_record(merged, replace(record_of(merged), calibration=Calibration(["old.txt"], 10, 2)))
    merged.save_pretrained(tmp_path / "merged")
    card = tmp_path / "merged" / "README.md"
    metadata = metadata_load(card)
    assert "custom_code" in metadata["tags"]
    assert metadata["model-index"]
    metadata_save(card, {**metadata, "tags": [*metadata["tags"], "mine"], "thumbnail": "mine.png"})
    card.write_text(card.read_text() + "\nAnd a word of mine.\n")

    export(tmp_path / "merged", tmp_path / "combined")
    kept = metadata_load(tmp_path / "combined" / "README.md")
    assert "model-index" not in kept
    assert {"mine", "mcsmoe"} <= {*kept["tags"]}
    assert "custom_code" not in kept["tags"]

    data = Calibration(["new/text"], 30, 3)
    fit = RouterFit(rows[:1], rows[2:], base, steps=0, calibration=data)
    record = export(tmp_path / "merged", tmp_path / "fitted", fit=fit)
    text = (tmp_path / "fitted" / "README.md").read_text()
    found = metadata_load(tmp_path / "fitted" / "README.md")
    assert found["thumbnail"] == "mine.png"
    assert found["datasets"] == ["new/text"]
    (model,) = found["model-index"]
    assert model["name"] == "fitted"
    values = {metric["type"]: metric["value"] for item in model["results"] for metric in item["metrics"]}
    assert values == {"loss": record.quality[record.judged].loss, "kl_divergence": record.quality[record.judged].kl}
    assert {item["dataset"]["type"] for item in model["results"]} == {"new/text"}
    assert "3 of 30 rows of new/text" in text
    assert "tokens of `old.txt`" in text
    assert "And a word of mine." in text


@pytest.mark.parametrize(
    ("options", "after", "factor"), [({"dense": True}, 4, 1), ({"dense": True, "expand": True}, 4, 2)]
)
def test_the_record_tells_how_experts_are_stored_now(
    options: dict[str, bool], after: int, factor: int, tmp_path: Path
) -> None:
    merged = quantize_experts(uniform("mixtral").merged, config=QuantizationConfig(bits=4, group_size=8))
    record = export(merged, tmp_path / "plain", **options)
    written = load_file(tmp_path / "plain" / "model.safetensors")
    for block, layer in enumerate(record.layers.values()):
        size = sum(
            value.nbytes for name, value in written.items() if f"layers.{block}." in name and ".experts." in name
        )
        assert (layer.after, layer.bits, layer.rank, layer.bytes) == (after, {}, {}, size)
    assert len({name for name in written if "layers.0." in name and name.endswith(".w1.weight")}) == factor * after
    assert "Experts are stored in" not in (tmp_path / "plain" / "README.md").read_text()


def test_the_number_that_is_advised_suits_picks_groups_and_engines() -> None:
    layers = moe_layers(example("deepseek_v3").merged)
    groups, picks = layers[0].model.config.n_group, layers[0].top_k
    found = nearest_uniform(layers, ["vllm"])
    assert found % groups == 0
    assert found >= max(picks, groups + 1)
