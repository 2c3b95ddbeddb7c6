"""Too few calibration rows are told of wherever output matrices are fitted: with bits alone, and with a size."""

from typing import Any

import pytest
import torch
from families import build
from helpers import batches

from hf_mcsmoe import MergeConfig, QuantizationConfig, RepairConfig, compress, moe_layers
from hf_mcsmoe.attached import record_of
from hf_mcsmoe.calibration.inputs import capture_inputs

JOINT = RepairConfig(method="joint")
BITS = QuantizationConfig(bits=8, group_size=8)


@pytest.mark.filterwarnings("ignore:Few calibration tokens", "ignore:The repair left")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": MergeConfig(experts=1.0), "quantization": BITS, "repair": JOINT}, 1),
        ({"config": MergeConfig(experts=7, budget="uniform"), "quantization": BITS, "repair": JOINT}, 1),
        ({"config": MergeConfig(experts=1.0), "quantization": BITS}, 0),
        pytest.param({"size": 0.7, "repair": JOINT}, 1, marks=pytest.mark.slow),
        pytest.param({"size": 0.7, "repair": RepairConfig(method="none")}, 0, marks=pytest.mark.slow),
    ],
    ids=["bits", "experts and bits", "bits, no repair", "size", "size, no repair"],
)
def test_too_few_rows_are_told_once(options: dict[str, Any], told: int) -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=2)
    rows = sum(len(batch["input_ids"]) for batch in data)
    record = record_of(compress(model, data, **options))
    found = [step.figures["few_rows"] for step in record.steps if "few_rows" in step.figures]
    assert len(found) == told
    for sentence in found:
        assert sentence.startswith(f"{rows} calibration rows leave the experts of ")
        assert "for 24 hidden units: about " in sentence
        assert record.card.count(sentence) == 1


def test_the_number_that_would_do_follows_from_the_tokens_of_the_median_expert() -> None:
    model = build("mixtral")
    data = batches("mixtral", model, number=2)
    rows, needed = sum(len(batch["input_ids"]) for batch in data), {}
    for layer in moe_layers(model):
        seen = capture_inputs([layer], data)[layer.name]
        counts = [int(((seen.index == expert).any(1) & ~seen.held_out).sum()) for expert in range(layer.num_experts)]
        needed[layer.name] = rows * 2 * 24 / int(torch.tensor(counts, dtype=torch.float64).quantile(0.5))
    student = compress(model, data, MergeConfig(experts=1.0), quantization=BITS, repair=JOINT)
    (sentence,) = [step.figures["few_rows"] for step in record_of(student).steps if step.figures]
    name, number = max(needed.items(), key=lambda item: item[1])
    assert name in sentence
    assert number <= int(sentence.split(": about ")[1].split(" rows")[0].replace(",", "")) <= 1.1 * number + 1
