"""Low rank + sparse without merging: all experts kept, each of their matrices decomposed."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches, logits
from layouts import LAYOUTS
from merged import check_without_package, example, merge, save
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, MergeConfig, compact, compress, decompose_experts, moe_layers
from hf_mcsmoe.evaluation.costs import expected_parameters
from hf_mcsmoe.modeling.losparse_mcsmoe import sparse_parts
from hf_mcsmoe.repair.methods import RepairConfig

NAMES = [name.replace("llama4", "llama4_text") for name in LAYOUTS]
SAVED = ["gpt_oss", "switch_transformers", "jetmoe"]
CHECKS = ["loads", "saves_again"]


@functools.cache
def _whole(name: str) -> PreTrainedModel:
    """Merge nothing."""
    return merge(example(name).base, name, MergeConfig(experts=1.0))[1]


def _compressed(name: str, **options: Any) -> PreTrainedModel:
    base = example(name).base
    options = {"rank": 2, "keep": 0.25} | options
    return compress(base, batches(name, base), MergeConfig(experts=1.0), low_rank=LoSparseConfig(**options))


@pytest.mark.parametrize("name", NAMES)
def test_the_training_form_is_the_original_model(name: str) -> None:
    case, model = example(name), decompose_experts(copy.deepcopy(_whole(name)), LoSparseConfig(rank=2, keep=0.25))
    torch.testing.assert_close(logits(model, case.batch), logits(case.base, case.batch), atol=1e-5, rtol=1e-4)
    layers = [layer.num_experts for layer in moe_layers(case.base)]
    assert [layer.num_experts for layer in moe_layers(model)] == layers
    assert len(sparse_parts(model)) == 2 * len(layers)


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers", "jetmoe"])
def test_it_holds_what_the_sizes_say_and_its_card_tells_the_truth(name: str) -> None:
    base, model = example(name).base, _compressed(name)
    stored = {layer.name: layer.num_experts for layer in moe_layers(base)}
    assert model.num_parameters() == expected_parameters(base, stored, rank=2, keep=0.25)
    card = model.mcsmoe_record.card
    assert f"| parameters | {base.num_parameters():,} | {model.num_parameters():,} |" in card
    assert "none were merged" in card
    assert "fewer experts" not in card
    assert "ranks [2], and the share 0.25" in card


@pytest.mark.slow
def test_the_folder_loads_without_the_package(tmp_path: Path) -> None:
    cases = {name: replace(example(name), merged=_compressed(name)) for name in SAVED}
    folder, scratch = tmp_path / "saved", tmp_path / "scratch"
    for path in (folder, scratch):
        path.mkdir()
    paths = {save(case, folder): CHECKS for case in cases.values()}
    reports = check_without_package(paths, scratch)
    problems = {(name, check): text for name, report in reports.items() for check, text in report.items() if text}
    assert len(reports) == len(SAVED)
    assert not problems


def test_it_can_be_decomposed_after_a_reload(tmp_path: Path) -> None:
    whole, batch = _whole("switch_transformers"), example("switch_transformers").batch
    whole.save_pretrained(tmp_path)
    loaded = type(whole).from_pretrained(tmp_path)
    model = decompose_experts(loaded, LoSparseConfig(rank=2, keep=0.25))
    assert sparse_parts(model)
    torch.testing.assert_close(logits(model, batch), logits(whole, batch), atol=1e-5, rtol=1e-4)


def test_layers_that_the_merge_left_out_stay_as_they_are(tmp_path: Path) -> None:
    case = example("mixtral")
    names = [layer.name for layer in moe_layers(case.base)]
    config = MergeConfig(experts=1.0, skip=(names[0],))
    model = merge(case.base, "mixtral", config)[1]
    with pytest.raises(ValueError, match="matches no layer"):
        decompose_experts(model, LoSparseConfig(rank=2, skip=names[0]))
    decompose_experts(
        model, LoSparseConfig(rank=2, keep=0.25, skip=names[1]), batches("mixtral", case.base), prune=True
    )
    compact(model)
    assert [bool(getattr(layer.container, "low_rank", None)) for layer in moe_layers(model)] == [
        False,
        False,
        True,
        True,
    ]
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())["mcsmoe"]
    assert set(entries["layers"]) == set(names[2:])
    assert entries["whole"] == [names[1]]
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, case.batch), logits(model, case.batch))


def test_layers_that_an_adaptive_budget_left_whole_are_decomposed_with_the_others() -> None:
    case = example("mixtral")

    def budget(saliency: list[torch.Tensor], experts: float, min_experts: int) -> list[int]:
        return [len(scores) if number else 4 for number, scores in enumerate(saliency)]

    model = merge(case.base, "mixtral", MergeConfig(budget=budget))[1]
    expected = logits(model, case.batch)
    decompose_experts(model, LoSparseConfig(rank=2, keep=0.25))
    assert [layer.num_experts for layer in moe_layers(model) if layer.container.low_rank] == [4, 8, 8, 8]
    torch.testing.assert_close(logits(model, case.batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_repair_where_nothing_was_merged() -> None:
    case = example("mixtral")
    data, config = batches("mixtral", case.base, number=32), MergeConfig(experts=1.0)
    low_rank = LoSparseConfig(rank=2, keep=0.25)
    repaired, plain = (
        compress(case.base, data, config, low_rank=low_rank, repair=repair)
        for repair in (RepairConfig(method="local", steps=60, batch_tokens=256, elsewhere=0.0, made=0.0), None)
    )
    assert "## Repair" in repaired.mcsmoe_record.card
    errors = [
        sum(float((logits(model, batch) - logits(case.base, batch)).norm()) for batch in data)
        for model in (repaired, plain)
    ]
    assert errors[0] < errors[1]
    with pytest.raises(ValueError, match="nothing to do"):
        compress(case.base, data, config, low_rank=low_rank, repair=RepairConfig(method="refit"))
    with pytest.raises(ValueError, match="nothing to do"):
        compress(case.base, data, config, repair=RepairConfig(method="local"))
