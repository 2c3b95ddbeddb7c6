"""The search for a size on small made models: bytes kept, choices told, the way from compress to a folder."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import batches, logits
from merged import stored_experts
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, collect_statistics, compress
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.choices import candidates, choose, fixed_bytes, ranks, smallest_bytes, whole_bytes
from hf_mcsmoe.search.conditions import check_curves, conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig
from hf_mcsmoe.search.curves import needs_of, reduced_by


def made_curves(layers: Layers, config: SizeConfig) -> dict[str, LayerCurves]:
    """Make curves as they look: fewer bits and experts cost more, in later layers less."""
    curves = {}
    for number, (first, *_) in enumerate(layers.tied, 1):
        choices = candidates([first], config)
        grids = {grid for choice in choices for grid in (choice.w_in, choice.w_out) if grid}
        parts = {grid: Part(4.0**-grid.bits, 4.0**-grid.bits / number) for grid in grids}
        reduced = {count: Part(1 / count, 0.1 / count / number) for count in range(1, first.num_experts)}
        low_rank = {rank: dict.fromkeys([0, *config.bits], Part(1.0, 0.5 / number)) for rank in ranks([first], config)}
        curves[first.name] = LayerCurves(first.num_experts, {"merge": reduced}, parts, parts, low_rank)
    return curves


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen3_moe")


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.9])
def test_a_choice_is_within_the_bytes_and_told_with_its_effect(model: PreTrainedModel, share: float) -> None:
    layers, config = Layers.of(model), SizeConfig(0.5, group_size=8)
    curves = made_curves(layers, config)
    limit = fixed_bytes(layers) + int(share * whole_bytes(layers))
    chosen = choose(layers, curves, config, limit)
    assert chosen.bytes <= limit
    assert chosen.predicted == {name: curves[name].effect(choice) for name, choice in chosen.choices.items()}
    one = choose(layers, curves, SizeConfig(0.5, group_size=8, uniform_experts=True), limit)
    assert len({choice.experts for choice in one.choices.values()}) == 1
    assert sum(one.predicted.values()) >= sum(chosen.predicted.values())


def test_options_hold_for_what_is_chosen(model: PreTrainedModel) -> None:
    layers, config = Layers.of(model), SizeConfig(0.5, bits=(4,), min_experts=3, group_size=8)
    for choice in candidates(layers.tied[0], config):
        assert {grid and grid.bits for grid in (choice.w_in, choice.w_out)} <= {None, 4}
        assert choice.experts >= 3
    with pytest.raises(ValueError, match=r"the smallest that can be reached is \d"):
        choose(layers, made_curves(layers, config), config, smallest_bytes(layers, config) - 1)


@pytest.mark.parametrize("chosen", [None, "frequency", "gate"])
def test_merging_goes_around_experts_that_contribute_unless_another_saliency_is_chosen(chosen: str | None) -> None:
    merge = replace(MergeConfig(saliency=chosen), seed=3)
    for reduce in ("merge", "prune"):
        assert reduced_by(merge, reduce).saliency == (chosen or "contribution")
    assert merge.saliency == chosen


def test_a_sum_that_a_reduction_needs_is_asked_for(model: PreTrainedModel) -> None:
    data = batches("qwen3_moe", model)
    statistics = collect_statistics(model, data)
    with pytest.raises(ValueError, match="'contribution' was not collected"):
        compress(model, data, size=SizeConfig(0.6, group_size=8), statistics=statistics)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str | None]] = {
    "the same": ({}, {}, {}, None),
    "fewer bits to choose from": ({}, {"bits": (4, 2)}, {}, None),
    "one reduction": ({}, {"reduce": "prune"}, {}, None),
    "more experts at least": ({}, {"min_experts": 3}, {}, None),
    "a layer less": ({"skip": "model.layers.0.*"}, {}, {}, None),
    "another budget and seed": ({"budget": "uniform", "seed": 5}, {}, {}, None),
    "saliency": ({"saliency": "gate"}, {}, {}, "saliency to merge 'contribution', not 'gate'"),
    "alignment": ({"alignment": "none"}, {}, {}, "alignment to merge"),
    "groups": ({}, {"group_size": 4}, {}, "group_size 8, not 4"),
    "fewer experts at least": ({}, {"min_experts": 1}, {}, "min_experts 2, not 1"),
    "bits": ({}, {"bits": (8, 4, 3)}, {}, "bits"),
    "repair": ({}, {}, {"method": "none"}, "repair's method 'joint', not 'none'"),
    "ridges": ({}, {}, {"ridges": (1.0,)}, "repair's ridges"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_curves_hold_for_the_options_that_they_were_measured_with(
    case: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    merge, size, repair, words = OTHERS[case]
    layers, measured = Layers.of(model), {"group_size": 8, "bits": (8, 4, 2), "min_experts": 2}
    search = SizeConfig(0.5, **measured)
    statistics = RoutingStatistics(layers.fingerprint, {layer.name: Sums() for layer in layers})
    statistics.curves = made_curves(layers, search)
    statistics.conditions = conditions(MergeConfig(), search, JOINT)
    statistics.save(tmp_path / "scores.safetensors")
    held = RoutingStatistics.load(tmp_path / "scores.safetensors")
    asked = MergeConfig(**merge), SizeConfig(0.3, **{**measured, **size}), replace(JOINT, **repair)
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        check_curves(layers, held, *asked)
    held.curves.popitem()
    with pytest.raises(ValueError, match="not measured of the layer"):
        check_curves(layers, held, *asked)


@pytest.mark.parametrize(
    ("repair", "words"),
    [
        ({"method": "local"}, "'local' is none that is solved at once: choose the repair joint, refit or none"),
        ({"method": "mean_shift"}, "'mean_shift' is none that is solved at once"),
        ({"method": "joint", "sequential": True}, "has no use for a repair with sequential=True"),
    ],
)
def test_repairs_that_no_choice_is_measured_with_are_refused(model: PreTrainedModel, repair: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compress(model, iter(()), size=0.5, repair=RepairConfig(**repair))


@pytest.mark.slow
def test_each_choice_is_repaired_as_asked(model: PreTrainedModel) -> None:
    data, size = batches("qwen3_moe", model), SizeConfig(0.5, group_size=8, reduce="merge", bits=(8,))
    needs = needs_of(MergeConfig(), size)
    errors, outputs = {}, {}
    for method in ("none", "refit", "joint"):
        statistics = collect_statistics(model, data, needs)
        result = compress(model, data, size=size, statistics=statistics, repair=RepairConfig(method=method))
        outputs[method] = logits(result, data[0])
        errors[method] = [curves.reduced["merge"] for curves in statistics.curves.values()]
        assert statistics.conditions["repair's method"] == method
    worst = {name: sum(part.error for parts in found for part in parts.values()) for name, found in errors.items()}
    assert worst["joint"] < worst["none"]
    assert worst["refit"] != worst["none"]
    assert not torch.equal(outputs["none"], outputs["joint"])


@pytest.mark.slow
def test_a_size_is_kept_on_disk_and_the_record_tells_of_it(model: PreTrainedModel, tmp_path: Path) -> None:
    data = batches("qwen3_moe", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = SizeConfig(0.6, group_size=8)
    result = compress(model, data, MergeConfig(), size=size, held_out=data[:1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save_pretrained(tmp_path / "small")
    told = record_of(result).size
    assert told is not None
    written = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert written <= told.asked
    assert written == pytest.approx(told.planned, rel=0.02)
    assert told.method in told.checked
    assert told.checked[told.method] == min(told.checked.values())
    assert json.loads((tmp_path / "small" / "mcsmoe_record.json").read_text())["size"]["asked"] == told.asked
    assert max(stored_experts(result)) <= Layers.of(model)[0].num_experts
    assert torch.isfinite(logits(result, data[0])).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "5 apples"}, "no known unit"),
        ({"size": "1B"}, "the smallest that can be reached is"),
        ({"size": "1TB"}, "nothing is to be done"),
        ({"size": 0.5, "consume": True}, "leave out consume"),
    ],
)
def test_what_cannot_be_is_refused_before_any_forward(model: PreTrainedModel, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compress(model, iter(()), **options)


def test_curves_are_kept_in_the_file_of_statistics(model: PreTrainedModel, tmp_path: Path) -> None:
    layers, config, file = Layers.of(model), SizeConfig(0.5, group_size=8), tmp_path / "scores.safetensors"
    statistics = collect_statistics(layers, batches("qwen3_moe", model))
    statistics.curves = made_curves(layers, config)
    statistics.save(file)
    assert RoutingStatistics.load(file).curves == statistics.curves
    name = layers[0].name
    statistics.curves = {name: LayerCurves(99, w_in={Grid(4): Part(1.0, 1.0)})}
    statistics.save(file)
    with pytest.raises(ValueError, match="99 experts"):
        RoutingStatistics.load(file).check({layer.name: layer.sizes for layer in layers})
    statistics.curves = {"elsewhere": statistics.curves[name]}
    statistics.save(file)
    with pytest.raises(ValueError, match="damaged"):
        RoutingStatistics.load(file)
