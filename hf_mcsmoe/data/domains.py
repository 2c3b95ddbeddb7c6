"""Of which data set each row of a batch is: a fit leaves each out in turn, to see how it does on other text."""

from collections.abc import Mapping
from typing import Any

import torch

# The name under which a feature holds the number of its data set; no model takes it.
DOMAIN = "domain"
# The number of rows that were made of others, which are no data set of the user's.
MADE = -2


class DomainBatch(dict[str, Any]):
    """A batch for `model(**batch)` that knows of which data set its rows are: `domain`, int [rows], from 0 on."""

    def __init__(self, batch: Mapping[str, Any], domain: int | torch.Tensor) -> None:
        """Take a batch, and one number for all its rows or one for each."""
        super().__init__(batch)
        self.domain = torch.as_tensor(domain)


def domains_of(batch: Mapping[str, Any], rows: int) -> torch.Tensor:
    """Return of which data set each row of a batch is, int [rows]; -1 where the batch does not know.

    Raises:
        ValueError: it knows that of another number of rows.
    """
    if not isinstance(batch, DomainBatch):
        return torch.full((rows,), -1)
    if batch.domain.numel() not in (1, rows):
        raise ValueError(f"domain names the data sets of {batch.domain.numel()} rows, and the batch has {rows}.")
    return batch.domain.long().cpu().flatten().expand(rows)


def chosen_rows(batch: Mapping[str, Any], rows: list[int]) -> Mapping[str, Any]:
    """Return some rows of a batch of tensors [rows, ...], with their data sets where it knows them."""
    chosen = {name: value[rows] for name, value in batch.items()}
    if not isinstance(batch, DomainBatch):
        return chosen
    total = len(next(iter(batch.values())))
    return DomainBatch(chosen, domains_of(batch, total)[rows])
