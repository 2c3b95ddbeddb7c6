"""Made text: rows of which half of the tokens are drawn at random, as further rows of a fit.

What a fit does to text of a kind that it has not seen, no text of the calibration data shows. But the original says of
any tokens what is right, and drawn ones take experts where that data does not.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.calibration.inputs import held_out_sequences, num_sequences
from hf_mcsmoe.data.domains import MADE, DomainBatch
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.labels import labels_are_of_tokens

# How many of a made row's tokens are drawn; the rest keeps it in reach of text.
DRAWN = 0.5
# All that may lie in a batch whose tokens can become others: no places, pictures or sounds.
NAMES = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask", "token_type_ids")


def made_batches(model: PreTrainedModel, batches: Sequence[Batch], share: float, seed: int = 0) -> list[Batch]:
    """Return rows of the batches with half of their tokens drawn evenly from the vocabulary, as a data set of its own.

    Special tokens stay where they are. Rows that judge a fit are left aside, and batches that hold more than tokens.

    Args:
        share: of the rows of each batch, 0 to 1.
    """
    generator, ordinary = torch.Generator().manual_seed(seed), _ordinary(model)
    made = list[Batch]()
    for batch, rows in _rows(batches, share):
        if rows and len(ordinary) and set(batch) <= set(NAMES) and "input_ids" in batch:
            chosen = {name: value[rows] for name, value in batch.items()}
            drawn = {name: _drawn(chosen[name], ordinary, generator) for name in _names_of_tokens(model, batch)}
            made.append(DomainBatch({**chosen, **drawn}, MADE))
    return made


def _names_of_tokens(model: PreTrainedModel, batch: Batch) -> list[str]:
    """Return the names of a batch's ids that a model reads: labels too, where a decoder reads them shifted."""
    names = [name for name in ("input_ids", "decoder_input_ids") if name in batch]
    reads_labels = model.config.is_encoder_decoder and "labels" in batch and "decoder_input_ids" not in batch
    return [*names, "labels"] if reads_labels and labels_are_of_tokens(model, batch) else names


def _ordinary(model: PreTrainedModel) -> torch.Tensor:
    """Return all ids of the vocabulary but those that the configuration has names for."""
    given = model.config.get_text_config().to_dict()
    named = [value for name, value in given.items() if name.endswith("_token_id") and value is not None]
    special = torch.tensor([number for one in named for number in (one if isinstance(one, list) else [one])])
    tokens = torch.arange(given.get("vocab_size", 0))
    return tokens[~torch.isin(tokens, special)]


def _rows(batches: Sequence[Batch], share: float) -> Iterator[tuple[Batch, list[int]]]:
    """Yield each batch, and the first of its rows that do not judge, so large a share of them."""
    judges, first = set(held_out_sequences(sum(map(num_sequences, batches)))), 0
    for batch in batches:
        number = num_sequences(batch)
        rows = [row for row in range(number) if first + row not in judges]
        first += number
        yield batch, rows[: round(share * len(rows) + 0.5 - 1e-9)]


def _drawn(ids: torch.Tensor, ordinary: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ids with half of the ordinary ones drawn anew."""
    numbers = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)].to(ids)
    chosen = (torch.rand(ids.shape, generator=generator) < DRAWN).to(ids.device)
    return torch.where(chosen & torch.isin(ids, ordinary.to(ids.device)), numbers, ids)
