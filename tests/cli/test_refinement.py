"""What follows a merge: refused before any forward where it can be, told in the card, and never at a model's cost."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches, costs_on_card, logits, state
from huggingface_hub import ModelCard
from merged import example
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe import LoSparseConfig, MergeConfig, RepairConfig, compress, moe_layers, repair_experts
from hf_mcsmoe.evaluation.costs import account

ROOT = Path(__file__).parents[2]
SMALL = {"rank": 2, "keep": 0.25}


def no_forward(module: nn.Module, *arguments: Any) -> None:
    """Fail."""
    raise AssertionError("the model ran")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "skip matches nothing": ({"low_rank": LoSparseConfig(**SMALL, skip=("nope",))}, "skip='nope' matches no layer"),
    "skip leaves nothing": ({"low_rank": LoSparseConfig(**SMALL, skip="*")}, "leaves no layer"),
    "skip of a layer that the merge leaves": (
        {"config": MergeConfig(skip="*.0.*"), "low_rank": LoSparseConfig(**SMALL, skip="*.0.*")},
        "matches no layer",
    ),
    "rank": ({"low_rank": LoSparseConfig(rank=12, keep=0.9)}, "larger than it is"),
    "a ratio that leaves nothing": (
        {"low_rank": LoSparseConfig(parameter_ratio=0.31, keep=0.3, scope="global")},
        "leaves no parameters",
    ),
    "any rank": ({"low_rank": LoSparseConfig(energy=0.5, keep=0.99, scope="global")}, "larger than it is"),
    "nothing to repair": ({"config": MergeConfig(experts=1.0), "repair": RepairConfig()}, "nothing to do"),
    "nothing to repair, by number": ({"config": MergeConfig(experts=8), "repair": RepairConfig()}, "nothing to do"),
    "nothing to repair, rounded": (
        {"config": MergeConfig(experts=0.95, budget="uniform"), "repair": RepairConfig()},
        "nothing to do",
    ),
    "energy that may be refused later": (
        {"low_rank": LoSparseConfig(energy=0.9999, keep=0.5), "consume": True},
        "allow_dense=True, or leave out consume",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_known_is_refused_before_any_forward(case: str) -> None:
    options, message = REFUSED[case]
    for consume in {options.get("consume", False), "repair" not in options}:
        model = copy.deepcopy(example("mixtral").base)
        model.register_forward_pre_hook(no_forward)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            compress(model, batches("mixtral", model), **{**options, "consume": consume})
        assert state(model) == before


def test_layers_that_share_experts_are_refused_before_any_forward() -> None:
    model = copy.deepcopy(example("mixtral").base)
    first, second = moe_layers(model)[:2]
    for name, parameter in first.parameters:
        setattr(second.container, name, parameter)
    model.register_forward_pre_hook(no_forward)
    with pytest.raises(ValueError, match="share their experts cannot be decomposed"):
        compress(model, batches("mixtral", model), low_rank=LoSparseConfig(**SMALL), consume=True)


def test_ranks_that_turn_out_too_large_leave_the_model_as_it_was() -> None:
    model = copy.deepcopy(example("mixtral").base)
    before = state(model)
    config = LoSparseConfig(energy=0.9999, keep=0.5)
    with pytest.raises(ValueError, match="larger than it is"):
        compress(model, batches("mixtral", model), low_rank=config)
    assert state(model) == before


def test_where_no_expert_would_be_smaller_all_stay_dense_with_a_warning() -> None:
    data = batches("mixtral", example("mixtral").base)
    plain = compress(example("mixtral").base, data)
    model = copy.deepcopy(example("mixtral").base)
    config = LoSparseConfig(energy=0.9999, keep=0.5, allow_dense=True)
    with pytest.warns(UserWarning, match="all stay dense"):
        dense = compress(model, data, low_rank=config, consume=True)
    assert dense is model
    assert torch.equal(logits(dense, data[0]), logits(plain, data[0]))
    assert "Low rank + sparse" not in dense.mcsmoe_record.card


def test_a_layer_is_skipped_by_the_name_that_the_original_has() -> None:
    base = example("jetmoe").base
    skipped, *others = [layer.name for layer in moe_layers(base)]
    model = compress(base, batches("jetmoe", base), low_rank=LoSparseConfig(**SMALL, skip=skipped))
    entries = model.config.mcsmoe["layers"]
    assert [name for name in entries if "low_rank" in entries[name]] == others


def test_no_repair_is_not_told_of() -> None:
    base, data = example("mixtral").base, batches("mixtral", example("mixtral").base)
    for options in ({}, {"config": MergeConfig(experts=1.0)}, {"consume": True}):
        model = compress(copy.deepcopy(base), data, repair=RepairConfig(method="none"), **options)
        plain = compress(copy.deepcopy(base), data, **options)
        assert "Repair" not in model.mcsmoe_record.card
        assert torch.equal(logits(model, data[0]), logits(plain, data[0]))


def _changed(model: PreTrainedModel, other: PreTrainedModel) -> tuple[int, int]:
    """Return how many experts of more than one member differ between two merged models, and how many there are."""
    changed, total = 0, 0
    for ours, theirs in zip(moe_layers(model), moe_layers(other), strict=True):
        members = Counter(ours.expert_map)
        for expert in (expert for expert, count in members.items() if count > 1):
            total += 1
            down = [layer.read().expert(expert)["down"] for layer in (ours, theirs)]
            changed += not torch.equal(*down)
    return changed, total


@pytest.mark.parametrize("low_rank", [None, LoSparseConfig(**SMALL)], ids=["dense", "low rank"])
def test_experts_that_a_repair_could_not_fit_are_told_of(low_rank: LoSparseConfig | None) -> None:
    base, data = example("mixtral").base, batches("mixtral", example("mixtral").base)
    plain = compress(base, data, MergeConfig(experts=0.5))
    repaired = copy.deepcopy(plain)
    config = RepairConfig(elsewhere=0.0, made=0.0, caution=0.0)  # fitted to so few tokens alone, some get no better
    repair_experts(repaired, base, data, config)
    changed, total = _changed(repaired, plain)
    assert 0 < changed < total
    message = rf"The repair left {total - changed} of the {total} experts"
    with pytest.warns(UserWarning, match=message):
        model = compress(base, data, MergeConfig(experts=0.5), repair=config, low_rank=low_rank)
    card = model.mcsmoe_record.card
    assert message in card.partition("## Repair\n")[2].partition("\n## ")[0]


def test_a_repair_that_changes_no_layer_is_told_of() -> None:
    base = example("mixtral").base
    data = [{key: value[:1, :2] for key, value in batch.items()} for batch in batches("mixtral", base, 1)]
    config = RepairConfig(method="local", steps=1, learning_rate=1e-12)
    few, left = (pytest.warns(UserWarning, match=text) for text in ("Few calibration tokens", "The repair left"))
    with few, left:
        model = compress(base, data, MergeConfig(experts=2, budget="uniform"), repair=config)
    assert "The repair left" in model.mcsmoe_record.card


@pytest.mark.slow
def test_the_command_line_tells_of_experts_that_were_not_repaired(tmp_path: Path) -> None:
    assets = ROOT / "hf_mcsmoe" / "demo_assets"
    arguments = ["compress", assets / "model", "--data", assets / "calibration.jsonl", "--output", tmp_path / "few"]
    arguments += ["--column", "source", "--target-column", "target", "--repair", "refit", "--num-samples", "2"]
    arguments += ["--experts", "0.5"]
    command = [sys.executable, "-m", "hf_mcsmoe.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "The repair left" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Warning: The repair left ")
    assert "decoder.block.1.layer.2.mlp.experts (experts " in lines[0]
    assert "The repair left" in (tmp_path / "few" / "README.md").read_text()


@pytest.mark.parametrize(
    ("experts", "low_rank", "columns"),
    [
        (0.5, None, ["before", "merged"]),
        (0.5, LoSparseConfig(**SMALL), ["before", "merged", "compressed"]),
        (1.0, LoSparseConfig(**SMALL), ["before", "compressed"]),
        (1.0, None, ["before", "after"]),
    ],
)
def test_the_card_tells_what_each_stage_costs(
    experts: float, low_rank: LoSparseConfig | None, columns: list[str], tmp_path: Path
) -> None:
    example("mixtral").base.save_pretrained(tmp_path / "base", save_original_format=False)
    base = type(example("mixtral").base).from_pretrained(tmp_path / "base")
    data = batches("mixtral", base)
    model = compress(base, iter(data), MergeConfig(experts=experts), low_rank=low_rank)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "again")
    loaded = type(model).from_pretrained(tmp_path / "out")
    for name in ("out", "again"):
        costs = costs_on_card(ModelCard.load(tmp_path / name / "README.md").text)
        assert costs[""] == [*columns, "saved"]
        sizes = [sum(f.stat().st_size for f in (tmp_path / path).glob("*.safetensors")) for path in ("base", name)]
        on_disk = costs["bytes on disk"]
        assert [on_disk[0], *on_disk[-2:]] == [*(f"{size:,}" for size in sizes), f"{1 - sizes[1] / sizes[0]:.1%}"]
        for column, each in ((0, base), (-2, loaded)):
            assert costs["parameters"][column] == f"{sum(p.numel() for p in each.parameters()):,}"
            held = sum(tensor.nbytes for tensor in [*each.parameters(), *each.buffers()])
            assert costs["bytes"][column] == f"{held:,}"
            assert costs["FLOPs per token"][column] == f"{account(each, data[0]).flops_per_token:,.0f}"
    if len(columns) == 3:
        merged = compress(base, data, MergeConfig(experts=experts))
        merged.save_pretrained(tmp_path / "merged")
        size = (tmp_path / "merged" / "model.safetensors").stat().st_size
        assert costs["parameters"][1] == f"{merged.num_parameters():,}"
        assert int(on_disk[1].replace(",", "")) == pytest.approx(size, rel=0.02)
