"""Models in few bits: what is stored, what it is fitted to, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Batch, batches, logits, relative_error
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mcsmoe import (
    MergeConfig,
    QuantizationConfig,
    RepairConfig,
    collect_statistics,
    compress,
    merge_experts,
    moe_layers,
    plan_merge,
    quantize_experts,
)
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact, decompose_experts


def merged(model: PreTrainedModel, data: list[Batch], experts: float = 0.5, **options: Any) -> PreTrainedModel:
    config = MergeConfig(experts=experts, budget="uniform", **options)
    return merge_experts(model, plan_merge(model, collect_statistics(model, data), config))


@pytest.fixture(scope="module")
def mixtral() -> tuple[PreTrainedModel, list[Batch], PreTrainedModel]:
    """Return a model of two layers, data, and the model with half of its experts."""
    model = build("mixtral")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    data = batches("mixtral", model)
    return model, data, merged(model, data)


def test_a_quantized_model_loads_as_it_was_saved(mixtral: Any, tmp_path: Path) -> None:
    model, data, student = mixtral
    told: list[tuple[str, int, int]] = []
    student = copy.deepcopy(student)
    config = QuantizationConfig(bits=3, group_size=8)
    before = logits(student, data[0])
    result = quantize_experts(student, model, data, config, progress=lambda *step: told.append(step))
    assert result is student
    names = moe_layers(student).names
    assert [done for _, done, _ in told] == list(range(len(names) + 1))
    for layer in student.config.mcsmoe["layers"].values():
        assert {weight: entry["bits"] for weight, entry in layer["quantized"].items()} == {
            "gate_up_proj": 3,
            "down_proj": 3,
        }
    assert 0 < relative_error(logits(student, data[0]), before) < 0.3
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, data[0]), logits(student, data[0]))
    assert record_of(loaded).steps[-1].options == config.to_dict()


def distance(result: PreTrainedModel, model: PreTrainedModel, data: list[Batch]) -> float:
    return sum(relative_error(logits(result, batch), logits(model, batch)) for batch in data)


def test_compensation_and_refit_bring_the_model_nearer_to_the_original(mixtral: Any) -> None:
    model, data, student = mixtral
    config = QuantizationConfig(bits=2, group_size=8)

    def reached(*arguments: Any, **options: Any) -> float:
        return distance(quantize_experts(copy.deepcopy(student), *arguments, **options), model, data)

    rounded = reached(None, None, config)
    compensated = reached(None, data, config)
    refitted = reached(model, data, config, repair=RepairConfig("joint"))
    assert refitted < compensated < rounded


def test_layers_that_were_left_whole_are_quantized_and_skipped_ones_are_not(mixtral: Any) -> None:
    model, data, _ = mixtral
    first, second = moe_layers(model).names
    for skipped in ({"merge": (first,)}, {"bits": (first,)}):
        student = merged(model, data, experts=1.0, skip=skipped.get("merge", ()))
        quantize_experts(student, None, data, QuantizationConfig(bits=8, group_size=8, skip=skipped.get("bits", ())))
        assert list(student.config.mcsmoe["layers"]) == [second]
        assert distance(student, model, data) < 0.05
        assert moe_layers(student)[0].num_parameters == moe_layers(model)[0].num_parameters


@pytest.mark.parametrize(
    ("options", "columns", "stages"),
    [
        ({"config": MergeConfig(experts=1.0)}, ["before", "compressed"], ["original", "quantized"]),
        (
            {"config": MergeConfig(experts=0.5), "low_rank": LoSparseConfig(rank=4), "repair": RepairConfig("joint")},
            ["before", "merged", "compressed"],
            ["original", "merged", "repaired", "low rank", "quantized"],
        ),
        (
            {"config": MergeConfig(experts=1.0), "repair": RepairConfig("joint")},
            ["before", "compressed"],
            ["original", "quantized"],
        ),
    ],
    ids=["untouched", "low rank", "refitted"],
)
def test_compress_quantizes_last(mixtral: Any, options: dict, columns: list[str], stages: list[str]) -> None:
    model, data, _ = mixtral
    told: list[tuple[str, int, int]] = []
    config = QuantizationConfig(bits=8, group_size=8)
    result = compress(
        model, data, quantization=config, held_out=data, progress=lambda *step: told.append(step), **options
    )
    record = record_of(result)
    assert [done for stage, done, _ in told if stage == "quantization"] == [0, 1, 2]
    assert list(record.costs) == columns
    assert list(record.quality) == stages
    assert record.steps[-1].options == config.to_dict()
    assert record.costs[columns[-1]].bytes_resident < record.costs[columns[-2]].bytes_resident
    divergences = [record.quality[stage].kl or 0.0 for stage in stages]
    assert divergences[-1] < divergences[-2] + 1e-3


def test_groups_that_do_not_divide_are_refused_before_any_forward(mixtral: Any) -> None:
    with pytest.raises(ValueError, match="group_size=48 does not divide the 32 inputs of W_in"):
        compress(mixtral[0], iter(()), quantization=QuantizationConfig(group_size=48))


def test_important_experts_have_more_bits(mixtral: Any) -> None:
    model, data, student = mixtral
    config = QuantizationConfig(bits=4, low_bits=2, low_share=0.25, group_size=8, importance="frequency")
    result = quantize_experts(copy.deepcopy(student), model, data, config)
    counts = collect_statistics(model, data)
    for layer in moe_layers(student):
        sums = torch.zeros(layer.num_experts)
        sums.index_add_(0, torch.tensor(layer.expert_map), counts[layer.original_name]["counts"].float())
        bits = result.config.mcsmoe["layers"][layer.original_name]["quantized"]["down_proj"]["bits"]
        assert sorted(bits) == [2, 4, 4, 4]
        assert sums[bits.index(2)] <= sums.min() * 1.1  # picks that meet in an expert are one here


def test_low_rank_experts_are_quantized_too(mixtral: Any) -> None:
    model, data, student = mixtral
    student = decompose_experts(copy.deepcopy(student), LoSparseConfig(rank=4, keep=0.25), data, prune=True)
    with pytest.raises(ValueError, match="training form: `compact` the model first"):
        quantize_experts(student, model, data)
    compact(student)
    before = distance(student, model, data)
    quantize_experts(student, model, data, QuantizationConfig(bits=8), repair=RepairConfig())
    assert distance(student, model, data) < before + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 must be one of 8, 4, 3, 2"),
        ({"bits": True}, "bits=True must be a whole number"),
        ({"bits": 4, "low_bits": 4}, "low_bits=4 must be fewer than bits=4"),
        ({"low_bits": 1}, "low_bits=1 must be one of 8, 4, 3, 2"),
        ({"low_share": 1.0}, "low_share=1.0 must be a share in"),
        ({"group_size": 0}, "group_size=0 must be a whole number of weights"),
        ({"group_size": 32.0}, "group_size=32.0 must be a whole number or None"),
        ({"symmetric": 1}, "symmetric=1 must be True or False"),
        ({"method": "gtpq"}, "Did you mean 'gptq'"),
        ({"importance": "frequent"}, "Did you mean 'frequency'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**options)


def test_options_are_written_and_read(tmp_path: Path) -> None:
    config = QuantizationConfig(bits=3, low_bits=2, skip="model.layers.0.*", method="nearest")
    config.save_pretrained(tmp_path)
    assert QuantizationConfig.from_pretrained(tmp_path) == config


def test_what_cannot_be_quantized_is_refused(mixtral: Any) -> None:
    model, _, student = mixtral
    before = copy.deepcopy(student.state_dict())
    for arguments, config, options, message in [
        ((model,), None, {}, "not compressed: quantize its experts with `compress"),
        ((student,), QuantizationConfig(group_size=48), {}, "group_size=48 does not divide the 32 inputs of W_in"),
        ((student,), QuantizationConfig(low_bits=2), {}, "low_bits=2 is for experts that calibration data tell"),
        ((student,), None, {"repair": RepairConfig("joint")}, "The repair 'joint' fits to calibration data"),
        ((student,), QuantizationConfig(skip="x"), {}, "skip='x' matches no layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_experts(*arguments, config=config, **options)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    quantized = quantize_experts(copy.deepcopy(student))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_experts(quantized)
