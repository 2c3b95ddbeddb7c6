"""Made rows: half of their tokens are drawn, all else stays, and none of them judges a fit."""

import pytest
import torch
from families import build
from helpers import batches

from hf_mcsmoe import moe_layers
from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.data.domains import MADE, DomainBatch
from hf_mcsmoe.repair.made import made_batches
from hf_mcsmoe.repair.methods import RepairConfig


def test_half_of_the_tokens_are_drawn_and_special_ones_and_masks_stay() -> None:
    model = build("qwen3_moe")
    model.config.eos_token_id, model.config.pad_token_id = [3, 4], 0
    ids = torch.randint(5, model.config.vocab_size, (10, 200))
    ids[:, :20] = torch.tensor([0, 3, 4, 3]).repeat(5)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.clone()}
    (made,) = made_batches(model, [batch], 1.0)
    rows = [0, 1, 2, 3, 5, 6, 7, 8]  # every fifth judges
    assert torch.equal(made["input_ids"][:, :20], ids[rows, :20])
    changed = (made["input_ids"][:, 20:] != ids[rows, 20:]).float().mean()
    assert 0.4 < changed < 0.6
    assert not torch.isin(made["input_ids"][:, 20:], torch.tensor([0, 3, 4])).any()
    assert torch.equal(made["attention_mask"], batch["attention_mask"][rows])
    assert torch.equal(made["labels"], batch["labels"][rows])
    assert isinstance(made, DomainBatch)
    assert made.domain.tolist() == MADE
    assert torch.equal(made["input_ids"], made_batches(model, [batch], 1.0)[0]["input_ids"])
    assert len(made_batches(model, [batch], 0.5)[0]["input_ids"]) == 4


def test_labels_are_drawn_where_a_decoder_reads_them_and_what_counts_stays() -> None:
    model = build("switch_transformers")
    ids = torch.randint(5, model.config.vocab_size, (4, 100))
    labels = torch.randint(5, model.config.vocab_size, (4, 100))
    labels[:, 90:] = -100
    (made,) = made_batches(model, [{"input_ids": ids, "labels": labels}], 1.0)
    assert torch.equal(made["labels"] == -100, labels[:3] == -100)
    assert not torch.equal(made["labels"], labels[:3])


@pytest.mark.parametrize("more", [{"pixel_values": torch.zeros(4, 3)}, {"position_ids": torch.zeros(4, 9).long()}])
def test_nothing_is_made_of_batches_that_hold_more_than_tokens_nor_of_none(more: dict[str, torch.Tensor]) -> None:
    model, ids = build("qwen3_moe"), torch.full((4, 9), 7)
    assert made_batches(model, [{"input_ids": ids, **more}], 1.0) == []
    assert made_batches(model, [{"input_ids": ids}], 0.0) == []


def test_the_rows_that_judge_are_the_same_with_made_rows_behind_them() -> None:
    model = build("qwen3_moe")
    data, layer = batches("qwen3_moe", model, number=2), moe_layers(model)[0]
    alone = capture_inputs([layer], data)[layer.name]
    both = capture_inputs([layer], [*data, *made_batches(model, data, 1.0)])[layer.name]
    made = both.domain == MADE
    assert made.any()
    assert not both.held_out[made].any()
    assert torch.equal(both.held_out[~made], alone.held_out)


def test_a_share_of_made_rows_is_between_nothing_and_all() -> None:
    with pytest.raises(ValueError, match=r"made=1\.5 must be between 0 and 1"):
        RepairConfig(made=1.5)
