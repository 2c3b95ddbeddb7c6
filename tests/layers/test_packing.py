"""Rows packed one behind the other give what each gives by itself, in every family and every pass, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import make_student, make_trainer
from families import build, families
from merged import example
from transformers import DataCollatorWithFlattening, PreTrainedModel

from hf_mcsmoe import RoutingStatistics, collect_statistics
from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.evaluation.costs import account
from hf_mcsmoe.evaluation.quality import perplexity
from hf_mcsmoe.layers.batches import forward
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.packing import apart, unpacked

ROWS = [[50, 60, 70, 80, 90], [55, 65, 75], [100, 101, 102, 103]]
LENGTHS = [len(row) for row in ROWS]
TOKENS = [token for row in ROWS for token in row]
NUMBERS = [number for number, row in enumerate(ROWS) for _ in row]
# No full batch of text goes through these by themselves, see the page of the families.
OTHERS = {"diffusion_gemma", "doge", "nllb_moe", "qwen3_omni_moe_talker", "switch_transformers"}
# One each: packs as it is, names no use_cache, is eager, convolves, recurs, has masks of its own.
FEW = ("mixtral", "granitemoe", "gpt_oss", "qwen3_5_moe", "jamba", "minimax")


def tensor(values: list[int], dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.tensor([values], dtype=dtype)


POSITIONS = {"position_ids": tensor([place for row in ROWS for place in range(len(row))])}
OFFSETS = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
MARKS: dict[str, dict[str, Any]] = {
    "positions": POSITIONS,
    "positions without a batch": {"position_ids": POSITIONS["position_ids"][0]},
    "positions in text and image": {"position_ids": POSITIONS["position_ids"].expand(4, 1, -1)},
    "positions and a mask that parts nothing": POSITIONS | {"attention_mask": tensor([1] * len(TOKENS))},
    "numbers in the mask": {"attention_mask": tensor([number + 1 for number in NUMBERS])},
    "numbers": {"seq_idx": tensor(NUMBERS, torch.int32)},
    "offsets": {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 5, "max_length_k": 5},
    "all of it": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": row} for row in ROWS]
    ),
}


def alone(model: PreTrainedModel) -> RoutingStatistics:
    return collect_statistics(model, [{"input_ids": tensor(row)} for row in ROWS])


def check_equal(found: RoutingStatistics, expected: RoutingStatistics) -> None:
    for name, sums in expected.layers.items():
        assert sums["tokens"] == len(TOKENS)
        for statistic, value in sums.items():
            torch.testing.assert_close(found[name][statistic], value, rtol=1e-4, atol=1e-4, msg=f"{name} {statistic}")


def check_family(name: str) -> None:
    model = build(name)
    found = collect_statistics(model, [{"input_ids": tensor(TOKENS), **POSITIONS}])
    check_equal(found, alone(model))


@pytest.mark.parametrize("name", FEW)
def test_the_statistics_of_packed_rows_are_those_of_the_rows(name: str) -> None:
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({family.name for family in families()} - OTHERS - {*FEW}))
def test_the_statistics_of_packed_rows_are_those_of_the_rows_in_every_family(name: str) -> None:
    check_family(name)


def check_no_cache(name: str) -> None:
    model = build(name)
    output = forward(model, {"input_ids": tensor(TOKENS), "use_cache": True})
    assert output.get("past_key_values") is None, name
    assert forward(model, {"input_ids": tensor(TOKENS)}).get("past_key_values") is None, name


@pytest.mark.parametrize("name", FEW)
def test_no_pass_keeps_a_cache(name: str) -> None:
    check_no_cache(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({family.name for family in families()} - OTHERS - {*FEW}))
def test_no_pass_of_any_family_keeps_a_cache(name: str) -> None:
    check_no_cache(name)


@pytest.mark.parametrize("kind", MARKS)
def test_whatever_says_where_rows_begin_is_read(kind: str) -> None:
    batch = unpacked({"input_ids": tensor(TOKENS), **MARKS[kind]}, encoder_decoder=False)
    assert batch.keys() <= {"input_ids", "attention_mask", "labels"}
    mask = batch["attention_mask"]
    assert mask.sum(1).tolist() == LENGTHS
    assert [row[kept == 1].tolist() for row, kept in zip(batch["input_ids"], mask, strict=True)] == ROWS


def test_the_label_that_parts_two_rows_is_that_of_its_token_again() -> None:
    batch = unpacked(MARKS["all of it"], encoder_decoder=False)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"][batch["attention_mask"] == 1], torch.tensor(TOKENS))
    answers = [-100, -100, 70, 80, 90, -100, -100, 75, -100, 101, -100, 103]
    packed = {"input_ids": tensor(TOKENS), "labels": tensor(answers), **POSITIONS}
    labels = unpacked(packed, encoder_decoder=False)["labels"]
    assert labels.tolist() == [[-100, -100, 70, 80, 90], [-100, -100, 75, -100, -100], [100, 101, -100, 103, -100]]


def test_rows_packed_in_several_lines_with_padding_and_positions_of_their_own() -> None:
    positions = torch.tensor([[2, 3, 4, 2, 3, 0], [0, 0, 2, 3, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    tokens = torch.arange(12).view(2, 6)
    batch = unpacked({"input_ids": tokens, "position_ids": positions, "attention_mask": mask}, encoder_decoder=False)
    kept = batch["attention_mask"] == 1
    pairs = zip(batch["input_ids"], batch["position_ids"], kept, strict=True)
    found = [(row[here].tolist(), places[here].tolist()) for row, places, here in pairs]
    assert found == [([0, 1, 2], [2, 3, 4]), ([3, 4], [2, 3]), ([8, 9], [2, 3]), ([10, 11], [2, 3])]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3]])},
        {
            "position_ids": torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        },
        {"position_ids": torch.zeros(3, 2, 4, dtype=torch.long)},
        {"cu_seq_lens_q": torch.tensor([0, 4, 8])},
    ],
    ids=lambda more: " ".join(more),
)
def test_rows_that_are_not_packed_stay_as_they_are(more: dict[str, torch.Tensor]) -> None:
    batch = {"input_ids": torch.arange(8).view(2, 4), **more}
    assert unpacked(batch, encoder_decoder=False) is batch


def test_batches_taken_apart_are_no_larger_than_they_were() -> None:
    rows = [[7] * 9, [8], [9], [6, 6], [5]]
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    model = build("mixtral")
    parts = list(apart(model, [batch]))
    assert [tuple(part["input_ids"].shape) for part in parts] == [(1, 9), (4, 2)]
    assert sum(int(part["attention_mask"].sum()) for part in parts) == 14


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("switch_transformers", {"labels": torch.tensor([[1, 2]])}, "cannot tell which target is whose"),
        ("mixtral", {"pixel_values": torch.zeros(1, 3, 4, 4)}, r"pixel_values \[1, 3, 4, 4\] does not say"),
        ("mixtral", {"cu_seq_lens_q": torch.tensor([0, 5])}, "must go from 0 up to 12"),
    ],
)
def test_rows_that_cannot_be_taken_apart_are_refused(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_statistics(build(name), [{"input_ids": tensor(TOKENS), **POSITIONS, **more}])


def test_what_repair_sees_and_what_evaluation_measures_are_those_of_the_rows() -> None:
    model = build("gpt_oss")
    packed, rows = [{"input_ids": tensor(TOKENS), **POSITIONS}], [{"input_ids": tensor(row)} for row in ROWS]
    for name, inputs in capture_inputs(Layers.of(model), rows).items():
        found = capture_inputs(Layers.of(model), packed)[name]
        torch.testing.assert_close(found.hidden, inputs.hidden, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.held_out, inputs.held_out), "whole rows judge"
    assert perplexity(model, packed) == pytest.approx(perplexity(model, rows), rel=1e-5)
    assert account(model, packed[0]).flops_per_token == pytest.approx(
        account(model, unpacked(packed[0], encoder_decoder=False)).flops_per_token
    )


def test_a_gradient_criterion_sees_the_rows_apart() -> None:
    model = build("mixtral")
    batch = unpacked(MARKS["positions"] | {"input_ids": tensor(TOKENS)}, encoder_decoder=False)
    packed = [{"input_ids": tensor(TOKENS), **POSITIONS}]
    found, expected = (collect_statistics(model, given, ["taylor"]) for given in (packed, list(apart(model, packed))))
    assert {*batch} == {"input_ids", "attention_mask"}
    for name, sums in expected.layers.items():
        torch.testing.assert_close(found[name]["taylor"], sums["taylor"])


@pytest.mark.parametrize("stored", [False, True])
def test_a_distillation_trains_on_packed_rows_as_on_the_rows(stored: bool, tmp_path: Path) -> None:
    losses = []
    for collator in (None, DataCollatorWithFlattening()):
        folder = tmp_path / type(collator).__name__
        options: dict[str, Any] = {"teacher_outputs": str(folder / "outputs")} if stored else {"expert_weight": 0.5}
        trainer = make_trainer(
            "mixtral",
            folder,
            model=make_student("jamba"),
            teacher=example("jamba").base,
            data_collator=collator,
            **options,
        )
        losses += [trainer.train().training_loss, trainer.evaluate(trainer.train_dataset)["eval_loss"]]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
