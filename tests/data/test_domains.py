"""Of which data set each row is: from the data that a user names to what a layer's experts see."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import moe_layers
from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.data.calibration import draw
from hf_mcsmoe.data.domains import DomainBatch, domains_of

WORDS = {"a": "what", "b": "seven"}


@pytest.mark.parametrize("shares", [("", ""), (":0.25", "")])
def test_rows_of_each_data_are_told_apart(
    shares: tuple[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The word that a data set begins its rows with says which of them a row is of."""
    for name, word in WORDS.items():
        (tmp_path / f"{name}.txt").write_text(f"{word} is times six\n" * 40)
    data = [f"{tmp_path / name}.txt{share}" for name, share in zip(WORDS, shares, strict=True)]
    calibration, model = Calibration(data, num_samples=32, batch_size=3), build("mixtral")
    first = {int(tokenizer(word)["input_ids"][0]): number for number, word in enumerate(WORDS.values())}
    seen = []
    for part in calibration.batches(calibration.read(), tokenizer, model):
        for batch in part:
            found = domains_of(batch, len(batch["input_ids"])).tolist()
            assert found == [first[int(row[0])] for row in batch["input_ids"]]
            seen += found
            model(**batch)
    assert set(seen) == {0, 1}


def test_naming_the_data_sets_draws_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    samples: list[Any] = [(f"what is {'seven ' * number}times", None) for number in range(1, 30)]
    options: dict[str, Any] = {"encoder_decoder": False, "num_samples": 12, "max_length": 8}
    plain = draw(samples, tokenizer, **options).features
    named = draw(samples, tokenizer, **options, domains=[number % 2 for number in range(29)]).features
    assert [{**feature, "domain": None} for feature in plain] == [{**feature, "domain": None} for feature in named]


def test_each_token_of_a_layer_is_of_the_data_set_of_its_row() -> None:
    model = build("mixtral")
    layer = moe_layers(model)[0]
    tokens = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask}
    data = [DomainBatch(batch, torch.tensor([2, 0, 2])), DomainBatch(batch, 1), batch]
    seen = capture_inputs([layer], data)[layer.name]
    lengths = [5, 2, 3]
    rows = [2, 0, 2, 1, 1, 1, -1, -1, -1]
    assert seen.domain.tolist() == [row for row, length in zip(rows, lengths * 3, strict=True) for _ in range(length)]
    assert seen.domains == [-1, 0, 1, 2]
    assert (seen + seen).domain.tolist() == seen.domain.tolist() * 2
    with pytest.raises(ValueError, match="the data sets of 2 rows, and the batch has 3"):
        capture_inputs([layer], [DomainBatch(batch, torch.tensor([0, 1]))])


def test_packed_rows_are_of_the_data_set_of_their_line() -> None:
    """Two lines of two texts each: taken apart they are four rows, of one data set by two."""
    model = build("mixtral")
    layer = moe_layers(model)[0]
    ids = torch.randint(50, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    batch = {"input_ids": ids, "position_ids": places}
    seen = capture_inputs([layer], [DomainBatch(batch, torch.tensor([7, 9]))])[layer.name]
    plain = capture_inputs([layer], [batch])[layer.name]
    assert torch.equal(seen.hidden, plain.hidden)
    assert seen.domain.tolist() == [7] * 6 + [9] * 6
    assert capture_inputs([layer], [DomainBatch(batch, 4)])[layer.name].domain.tolist() == [4] * 12
    assert plain.domain.tolist() == [-1] * 12
