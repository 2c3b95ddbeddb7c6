"""Text from a file, a table or a data set of the Hub, as samples."""

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import load_dataset
from transformers import PreTrainedModel

TABLES = {".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Rows of a streamed data set among which the samples are drawn.
SHUFFLE_BUFFER = 10_000

# A row of a table, by column; a text and its target, None where there is none.
Row = Mapping[str, Any]
Sample = tuple[str, str | None]


def read_samples(
    source: str, *, column: str | None = None, target_column: str | None = None, split: str = "train"
) -> list[Sample]:
    """Return the (text, target) pairs of `source`; the target is None without a `target_column`.

    Args:
        source: a text file (samples are paragraphs, or lines where there are no empty lines), a `.json`, `.jsonl`,
            `.csv`, `.tsv` or `.parquet` file, any of them gzipped, or a data set: a folder or Hub id, `id:config`.
        column: the column with the text; by default `text`, or the only column of text.

    Raises:
        ValueError: no such file or data set, an empty one, one that is not text, or one without the column.
    """
    path = Path(source)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        rows = _dataset_rows(source, split)
    elif suffix == ".json":
        rows = _json_rows(path)
    elif suffix in TABLES:
        arguments = {"delimiter": "\t"} if suffix == ".tsv" else {}
        rows = load_rows(TABLES[suffix], data_files=str(path), split="train", streaming=True, **arguments)
    else:
        rows = [{"text": text} for text in _paragraphs(_text(path))]
    samples = _columns(rows, source, column, target_column)
    if not samples:
        raise ValueError(f"{source} holds no text.")
    return samples


def check_token_ids(largest: int, model: PreTrainedModel) -> None:
    """Raise ValueError where a tokenizer gives a token, `largest`, that the model has no embedding of."""
    vocabulary = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {largest}, the model has {vocabulary} embeddings: this tokenizer belongs to "
            "another model."
        )


def _text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error}).") from None


def _paragraphs(text: str) -> list[str]:
    parts = re.split(r"\n\s*\n", text) if re.search(r"\n\s*\n\s*\S", text.strip()) else text.splitlines()
    return [part.strip() for part in parts if part.strip()]


def _json_rows(path: Path) -> Iterable[dict[str, Any]]:
    """Read a JSON document: a list of texts or of rows, or texts by name, which are cut into paragraphs."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); JSON Lines files end in .jsonl.") from None
    if isinstance(content, dict):
        values = [value if isinstance(value, list) else [value] for value in content.values()]
        content = [part for value in values for text in value for part in _paragraphs(str(text))]
    return [row if isinstance(row, dict) else {"text": row} for row in content]


def _dataset_rows(source: str, split: str) -> Iterable[dict[str, Any]]:
    name, _, configuration = source.partition(":")
    if Path(source).suffix in {*TABLES, ".txt", ".json", ".gz"}:
        raise ValueError(f"There is no file {source}.")
    data = load_rows(name, configuration or None, split=split, streaming=True)
    return islice(data.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER), SHUFFLE_BUFFER)


def load_rows(*arguments: Any, **keywords: Any) -> Any:
    """Call `datasets.load_dataset`.

    Raises:
        ValueError: whatever went wrong in there.
    """
    try:
        return load_dataset(*arguments, **keywords)
    except Exception as error:
        # Whatever goes wrong in there (offline, no such id, configuration or split), the way out is the same.
        raise ValueError(
            f"Cannot load the data set {keywords.get('data_files', arguments[0])!r}: {error} Give a file, a folder "
            "or a Hub id, with a configuration as id:config."
        ) from None


def _columns(rows: Iterable[dict[str, Any]], source: str, column: str | None, target: str | None) -> list[Sample]:
    samples: list[Sample] = []
    for number, row in enumerate(rows):
        column = column or _text_column(row, source)
        if number == 0:
            missing = [name for name in (column, target) if name is not None and name not in row]
            if missing:
                raise ValueError(f"{source} has no column {missing[0]!r}; it has {', '.join(map(repr, row))}.")
        if target is not None and row.get(target) is None:
            continue
        if isinstance(text := row.get(column), str) and text.strip():
            samples.append((text, None if target is None else str(row[target])))
        elif not isinstance(text, str | None):
            raise ValueError(f"Column {column!r} of {source} holds {type(text).__name__}, not text.")
    return samples


def _text_column(row: dict[str, Any], source: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(texts) != 1:
        if "text" in row:
            return "text"
        raise ValueError(f"{source} has the columns {', '.join(map(repr, row))}: name the one with the text (column).")
    return texts[0]
