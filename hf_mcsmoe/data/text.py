"""Text from a file, a table or a data set of the Hub, as samples. Only a string is text."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_mcsmoe.data.chat import COLUMNS, PAIR, Chat, chat_of, is_chat
from hf_mcsmoe.data.readers import SUFFIXES, file_rows, folder_tables, streamed_rows
from hf_mcsmoe.progress import Progress, counted, silent

# Rows of a streamed data set among which the samples are drawn.
SHUFFLE_BUFFER = 10_000
# Labels of more kinds than this are taken for a mistake.
MOST_LABELS = 100
# Rows after which progress is told.
TOLD_EVERY = 256

# A row of a table, by column; a text or conversation and its target, None where there is none.
Row = Mapping[str, Any]
Sample = tuple[str | Chat, str | None]


def read_samples(
    source: str,
    *,
    column: str | None = None,
    target_column: str | None = None,
    split: str = "train",
    progress: Progress | None = None,
) -> list[Sample]:
    """Return the (text, target) pairs of `source`; the target is None without a `target_column`.

    Rows without a text, or without a target where one is named, are left out.

    Args:
        source: a text file (samples are paragraphs, or lines where there are no empty lines), a `.json`, `.jsonl`,
            `.csv`, `.tsv` or `.parquet` file, any of them gzipped, or a data set: a folder or Hub id, `id:config`.
        column: the column with the text or conversation; by default `text`, else `messages` or `conversations`, else
            `prompt` followed by `completion`, else the only column of text.
        progress: called as `progress("reading", rows done, rows)`; the total is None until all are read.

    Raises:
        ValueError: no such file or data set, an empty one, one that holds something that is no text, or one without
            the column.
    """
    rows = counted(_rows(source, split), "reading", progress or silent, every=TOLD_EVERY)
    samples = samples_of(rows, source, column=column, target_column=target_column)
    if not samples:
        raise ValueError(f"{source} holds no text.")
    return samples


def labelled_samples(
    source: str,
    label_column: str,
    *,
    column: str | None = None,
    target_column: str | None = None,
    split: str = "train",
) -> dict[str, list[Sample]]:
    """Return the samples of each label, by what stands in `label_column` as text; rows without a label are left out.

    The other arguments and errors are those of `read_samples`.

    Raises:
        ValueError: no such column, one that holds the text itself, or more than `MOST_LABELS` labels.
    """
    rows: dict[str, list[Row]] = {}
    if label_column in (column, target_column):
        raise ValueError(f"Column {label_column!r} of {source} cannot hold both the text and its label.")
    for row in _rows(source, split):
        if not isinstance(row, Mapping):
            _check_no_columns(source, label_column)
            continue
        _check_columns(row, source, label_column, None)
        if (label := row[label_column]) is not None:
            # Or it might be taken for the text.
            others = {name: value for name, value in row.items() if name != label_column}
            rows.setdefault(str(label), []).append(others)
    if len(rows) > MOST_LABELS:
        raise ValueError(
            f"Column {label_column!r} of {source} holds {len(rows):,} different values: labels are at most "
            f"{MOST_LABELS}."
        )
    options = {"column": column, "target_column": target_column}
    found = {label: samples_of(part, source, **options) for label, part in sorted(rows.items())}
    found = {label: samples for label, samples in found.items() if samples}
    if not found:
        raise ValueError(f"{source} holds no text with a label.")
    return found


def _rows(source: str, split: str) -> Iterable[Any]:
    if not source.strip():
        raise ValueError(f"{source!r} names no data: give a file, a folder or a Hub id.")
    path = Path(source)
    return file_rows(path, split) if path.is_file() else _dataset_rows(source, split)


def samples_of(
    rows: Iterable[Any], source: str, *, column: str | None = None, target_column: str | None = None
) -> list[Sample]:
    """Return the samples of rows: texts, conversations (lists of messages), or objects with a column of either.

    Args:
        source: what an error calls them.

    Raises:
        ValueError: rows that hold something else, which is named with its type and place, or that lack the column.
    """
    samples: list[Sample] = []
    columns: tuple[str, ...] = ()
    for number, row in enumerate(rows, start=1):
        place = f"row {number} of {source}"
        if isinstance(row, Mapping):
            if not columns:
                _check_columns(row, source, column, target_column)
                columns = _text_columns(row, source) if column is None else (column,)
            sample = _sample(row, place, columns, target_column)
        else:
            _check_no_columns(source, column, target_column)
            sample = (_text(row, place), None)
        if sample is not None and sample[0]:
            samples.append(cast(Sample, sample))
    return samples


def check_token_ids(largest: int, model: PreTrainedModel) -> None:
    """Raise ValueError where a tokenizer gives a token, `largest`, that the model has no embedding of."""
    vocabulary = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {largest}, the model has {vocabulary} embeddings: this tokenizer belongs to "
            "another model."
        )


def _dataset_rows(source: str, split: str) -> Iterable[dict[str, Any]]:
    name, _, configuration = source.partition(":")
    if Path(source).suffix.lower() in SUFFIXES:
        raise ValueError(f"There is no file {source}.")
    # Of a folder with a colon in its name the whole of it is the name.
    name, configuration = (source, "") if Path(source).exists() else (name, configuration)
    if Path(name).is_dir() and (tables := folder_tables(Path(name), split)):
        return itertools.chain.from_iterable(file_rows(table, split) for table in tables)
    return streamed_rows(name, configuration or None, split=split, shuffled=SHUFFLE_BUFFER)


def _check_columns(row: Row, source: str, column: str | None, target: str | None) -> None:
    missing = [name for name in (column, target) if name is not None and name not in row]
    if missing:
        raise ValueError(f"{source} has no column {missing[0]!r}; it has {', '.join(map(repr, row))}.")


def _check_no_columns(source: str, *columns: str | None) -> None:
    named = [name for name in columns if name is not None]
    if named:
        raise ValueError(f"{source} holds texts, not rows with columns: leave out column {named[0]!r}.")


def _sample(row: Row, place: str, columns: tuple[str, ...], target: str | None) -> tuple[Any, str | None] | None:
    """Return what a row holds; None where it holds no target."""
    if columns == PAIR and target is None:
        return _pair(row, place), None
    column, *_ = columns
    answer = None if target is None else row.get(target)
    if target is not None:
        if answer is None:
            return None
        if not isinstance(answer, str):
            raise ValueError(f"Column {target!r} holds {_kind(answer)}, not text, in {place}: write targets as text.")
    return _text(row.get(column), place, column, row.get("tools")), answer


def _pair(row: Row, place: str) -> str | Chat:
    """Return a prompt and its completion as one text or conversation."""
    prompt, completion = (_text(row.get(name), place, name, row.get("tools")) for name in PAIR)
    if isinstance(prompt, Chat) and isinstance(completion, Chat):
        return Chat(prompt.messages + completion.messages, prompt.tools)
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    raise ValueError(f"In {place} one of prompt and completion is text and the other a conversation.")


def _text(value: Any, place: str, column: str | None = None, tools: Any = None) -> str | Chat:
    """Return a value as the text or conversation that it is, "" for nothing.

    Raises:
        ValueError: it is neither.
    """
    if value is None and column is not None:
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if is_chat(value):
        try:
            return chat_of(cast(Sequence[Mapping[str, Any]], value), tools)
        except ValueError as error:
            raise ValueError(f"In {place} {error}.") from None
    where = f"{place[0].upper()}{place[1:]} holds" if column is None else f"Column {column!r} holds"
    ending = "" if column is None else f", in {place}"
    raise ValueError(f"{where} {_kind(value)}, not text or a list of messages{ending}.")


def _kind(value: Any) -> str:
    return type(value).__name__


def _text_columns(row: Row, source: str) -> tuple[str, ...]:
    """Return the column with the text, or those with a prompt and its completion."""
    for name in ("text", *COLUMNS):
        if name in row:
            return (name,)
    if all(name in row for name in PAIR):
        return PAIR
    texts = [name for name, value in row.items() if isinstance(value, str)]
    nested = [name for name, value in row.items() if isinstance(value, list | tuple | Mapping)]
    if len(texts) != 1 or nested:
        raise ValueError(
            f"{source} has the columns {', '.join(map(repr, row))}: name the one with the text (--column, column)."
        )
    return (texts[0],)
