"""Rows that are packed one behind the other in a batch, taken apart: no family is relied on to keep them apart.

A third of the families do not: convolutions, recurrent states and masks of their own reach over where a row begins.
Rows beside each other, padded on the right behind a mask, are to all of them what each row is by itself.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

Batch = Mapping[str, Any]
Row = dict[str, Any]
# What says nothing but where packed rows begin, as `DataCollatorWithFlattening` writes it.
MARKS = frozenset(["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"])
INPUTS = ("input_ids", "inputs_embeds")
# What padding is filled with; all else repeats the row's last entry, which is valid whatever it is.
FILL = {"labels": -100, "attention_mask": 0}


def apart(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches; of one with packed rows these rows beside each other, in batches of no more positions.

    Rows are packed where `position_ids` [batch, length] restart, `attention_mask` numbers the rows, or `cu_seq_lens_q`
    or `seq_idx` say where they begin. Their order stays, and so does of which data set each is.

    Raises:
        ValueError: see `packed_rows`.
    """
    for batch in batches:
        rows = packed_rows(batch, encoder_decoder=_has_encoder(model))
        if rows is None:
            yield batch
            continue
        first, domains = 0, _domains(batch)
        for group in _groups(rows, _inputs(batch).shape[:2].numel()):
            own = None if domains is None else domains[first : first + len(group)]
            yield _of_domains(batch, side_by_side(group), own)
            first += len(group)


def unpacked(batch: Batch, *, encoder_decoder: bool) -> Batch:
    """Return a batch; one with packed rows as a single batch of these rows beside each other.

    Raises:
        ValueError: see `packed_rows`.
    """
    rows = packed_rows(batch, encoder_decoder=encoder_decoder)
    return batch if rows is None else _of_domains(batch, side_by_side(rows), _domains(batch))


def _domains(batch: Batch) -> torch.Tensor | None:
    """Return the data set of each packed row, int [rows]: that of its line; None where the batch does not know."""
    domain = getattr(batch, "domain", None)  # of a `DomainBatch`
    if domain is None:
        return None
    lines = len(_inputs(batch))
    return domain.cpu().flatten().expand(lines).repeat_interleave(_begins(batch).sum(1))


def _of_domains(batch: Any, rows: Row, domains: torch.Tensor | None) -> Batch:
    """Return rows of a batch as one of its kind, which knows of which data sets they are, where that one does."""
    return rows if domains is None else type(batch)(rows, domains)


def packed_rows(batch: Batch, *, encoder_decoder: bool) -> list[Row] | None:
    """Return the rows of a batch, each as a batch of one; None where none are packed.

    The label of a row's first token, which nothing predicts, counts where that of the next one does: -100 there only
    parts the rows.

    Raises:
        ValueError: rows that cannot be taken apart, for the batch does not say which parts of it belong to which row.
    """
    if not isinstance(batch, Mapping) or not any(isinstance(batch.get(name), torch.Tensor) for name in INPUTS):
        return None
    begins = _begins(batch)
    if not begins[:, 1:].any():
        return None
    if encoder_decoder:
        raise ValueError(
            "The batch packs several texts in a row, and an encoder-decoder cannot tell which target is whose: pass "
            "the texts beside each other, padded, with an attention_mask."
        )
    shape, rows = begins.shape, []
    fields = _fields(batch, shape)
    for number, line in enumerate(begins):
        edges = [*line.nonzero().flatten().tolist(), shape[1]]
        for start, stop in itertools.pairwise(edges):
            place = (number, start, stop)
            rows.append({name: _part(name, value, place, shape) for name, value in fields.items()})
    return _without_usual_positions([_with_first_label(_with_mask(row)) for row in rows])


def side_by_side(rows: Sequence[Row]) -> Row:
    """Return rows, each a batch of one, as one batch, padded on the right."""
    lengths = [_inputs(row).shape[1] for row in rows]
    joined: Row = {}
    for name, value in rows[0].items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            joined[name] = value
            continue
        axis, _ = _axes(name, value)
        joined[name] = torch.cat([_padded(row, name, max(lengths)) for row in rows], axis)
    return joined


def _has_encoder(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _inputs(batch: Batch) -> torch.Tensor:
    return next(batch[name] for name in INPUTS if isinstance(batch.get(name), torch.Tensor))


def _begins(batch: Batch) -> torch.Tensor:
    """Return where rows begin, bool [batch, length]; the first column does always."""
    shape = _inputs(batch).shape[:2]
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[:, 0] = True
    if batch.get("cu_seq_lens_q") is not None:
        begins |= _starts(batch["cu_seq_lens_q"], shape)
    mask, positions, numbers = (_lines(batch, name) for name in ("attention_mask", "position_ids", "seq_idx"))
    for number, line in enumerate(begins):
        places = torch.arange(shape[1]) if mask is None else mask[number].nonzero().flatten()
        for lines in (mask, numbers):
            if lines is not None:
                line[places[1:]] |= lines[number][places].diff() != 0
        if positions is not None:
            steps = positions[number][places].diff()
            # Padding between two tokens takes positions or not, but a row never goes back.
            line[places[1:]] |= torch.where(places.diff() > 1, steps <= 0, steps != 1)
    return begins


def _lines(batch: Batch, name: str) -> torch.Tensor | None:
    """Return a value int [batch, length] of a batch, on the CPU; None where there is none of that kind.

    Of positions on several axes the first of four are those in the text; three are places in images, which repeat.
    """
    value, (size, length) = batch.get(name), _inputs(batch).shape[:2]
    if value is None or isinstance(value, Mapping):
        return None
    value = torch.as_tensor(value).cpu()
    if name == "position_ids" and value.ndim == 3 and len(value) == 4:
        value = value[0]
    fits = value.ndim in (1, 2) and value.shape[-1] == length
    return value.long().expand(size, length) if fits else None


def _starts(offsets: Any, shape: torch.Size) -> torch.Tensor:
    """Return where rows begin by the offsets of all rows of a batch one behind the other, bool [batch, length].

    Raises:
        ValueError: offsets of other rows.
    """
    offsets = torch.as_tensor(offsets).flatten().cpu().long()
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != shape.numel() or (offsets.diff() < 0).any():
        raise ValueError(
            f"cu_seq_lens_q is {offsets.tolist()}; of {shape.numel()} tokens it must go from 0 up to {shape.numel()}."
        )
    flat = torch.zeros(shape.numel(), dtype=torch.bool)
    flat[offsets[:-1]] = True
    return flat.view(shape)


def _fields(batch: Batch, shape: torch.Size) -> Row:
    """Return what rows are cut from, and what holds for all of them, of a batch whose inputs are [batch, length].

    Raises:
        ValueError: tensors that belong to some row, and the batch does not say to which.
    """
    fields = {name: value for name, value in batch.items() if name not in MARKS}
    for name, value in fields.items():
        known = name == "position_ids" or not isinstance(value, torch.Tensor) or value.ndim == 0
        if not known and value.shape[:2] != shape:
            raise ValueError(
                f"The batch packs several texts in a row, and its {name} {list(value.shape)} does not say to which "
                f"of them it belongs, unlike inputs {list(shape)}: pass the texts beside each other, padded, with an "
                "attention_mask."
            )
    return fields


def _part(name: str, value: Any, place: tuple[int, int, int], shape: torch.Size) -> Any:
    """Return what a row has of a value of the batch, given its line, where it starts and where it stops."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    number, start, stop = place
    if name == "position_ids":
        return value.expand(*value.shape[:-2], *shape)[..., number : number + 1, start:stop]
    return value[number : number + 1, start:stop]


def _with_mask(row: Row) -> Row:
    inputs, mask = _inputs(row), row.get("attention_mask")
    ones = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    return {**row, "attention_mask": ones if mask is None else (mask != 0).long()}


def _without_usual_positions(rows: list[Row]) -> list[Row]:
    """Drop positions that are those of any text: not every family takes them."""
    given = [row["position_ids"] for row in rows if row.get("position_ids") is not None]
    if all(bool((value == torch.arange(value.shape[-1], device=value.device)).all()) for value in given):
        return [{name: value for name, value in row.items() if name != "position_ids"} for row in rows]
    return rows


def _with_first_label(row: Row) -> Row:
    labels, tokens = row.get("labels"), row.get("input_ids")
    if labels is None or tokens is None or labels.shape != tokens.shape or labels.shape[1] == 1:
        return row
    counted = labels[0] != -100
    if counted[0] or not counted[1] or bool((labels != tokens)[0, counted].any()):
        return row
    return {**row, "labels": torch.cat([tokens[:, :1], labels[:, 1:]], 1)}


def _padded(row: Row, name: str, length: int) -> torch.Tensor:
    value, (_, axis) = row[name], _axes(name, row[name])
    last = value.narrow(axis, value.shape[axis] - 1, 1)
    filling = torch.full_like(last, FILL[name]) if name in FILL else last
    return torch.cat([value, filling.repeat_interleave(length - value.shape[axis], axis)], axis)


def _axes(name: str, value: torch.Tensor) -> tuple[int, int]:
    """Return the axes of the rows and of their positions."""
    return (value.ndim - 2, value.ndim - 1) if name == "position_ids" else (0, 1)


def _groups(rows: list[Row], positions: int) -> Iterator[list[Row]]:
    """Yield rows that follow each other in lists that padding leaves no larger than the batch was."""
    group: list[Row] = []
    longest = 0
    for row in rows:
        length = max(longest, _inputs(row).shape[1])
        if group and length * (len(group) + 1) > positions:
            yield group
            group, length = [], _inputs(row).shape[1]
        group.append(row)
        longest = length
    yield group
