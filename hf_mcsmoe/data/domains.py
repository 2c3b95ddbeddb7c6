"""Of which data set each row of a batch is: a fit leaves each out in turn, to see how it does on other text."""

from collections.abc import Mapping
from typing import Any

import torch

# The name under which a feature holds the number of its data set; no model takes it.
DOMAIN = "domain"


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
