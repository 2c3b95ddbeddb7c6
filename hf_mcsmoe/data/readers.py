"""Rows of a file: text, JSON, JSON Lines, tables, of which each cell is text, whatever it says."""

import contextlib
import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from datasets import load_dataset

from hf_mcsmoe.data.chat import COLUMNS, is_chat

LINES, DOCUMENT, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Of files that do not exist these are no names of data sets.
SUFFIXES = {*LINES, DOCUMENT, PARQUET, *DELIMITERS, ".txt", ".gz"}
# Bytes at the start of a file that are looked at for what no text holds.
START = 4096


def kind_of(path: Path) -> str:
    """Return a file's suffix in small letters, of a gzipped one that before `.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def file_rows(path: Path, split: str) -> Iterable[Any]:
    """Return what a file holds, row by row: texts, objects, or what else stands in JSON.

    Args:
        split: of a JSON document that holds lists by name, the one to read, if it is there.

    Raises:
        ValueError: a damaged file, or one that is not what its name says.
    """
    kind = kind_of(path)
    if kind in LINES:
        return _lines(path)
    if kind == DOCUMENT:
        return _document(path, split)
    if kind in DELIMITERS:
        return _table(path, DELIMITERS[kind])
    if kind == PARQUET:
        return streamed_rows("parquet", data_files=str(path), split="train")
    return _paragraphs(_text(path))


def load_rows(*arguments: Any, **keywords: Any) -> Any:
    """Call `datasets.load_dataset`.

    Raises:
        ValueError: whatever went wrong in there.
    """
    with _told(keywords.get("data_files", arguments[0])):
        return load_dataset(*arguments, **keywords)


def streamed_rows(*arguments: Any, shuffled: int = 0, **keywords: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set as they are read, or as many as are `shuffled` of those at its start.

    Raises:
        ValueError: whatever went wrong, also on the way.
    """
    rows = load_rows(*arguments, **keywords, streaming=True)
    if shuffled:
        rows = itertools.islice(rows.shuffle(seed=0, buffer_size=shuffled), shuffled)
    with _told(keywords.get("data_files", arguments[0])):
        yield from rows


def folder_tables(folder: Path, split: str) -> list[Path]:
    """Return the tables that lie in a folder, those named after a split if there are any."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and kind_of(path) in DELIMITERS]
    return [path for path in files if split in path.name.lower()] or files


@contextlib.contextmanager
def _told(name: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever goes wrong in there (offline, no such id, configuration or split), the way out is the same.
        raise ValueError(
            f"Cannot load the data set {name!r}: {error} Give a file, a folder or a Hub id, with a configuration as "
            "id:config."
        ) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a text file in UTF-8, with or without a mark of that at its start, gzipped or not.

    Raises:
        ValueError: it is not such a file.
    """
    open_file: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            if b"\0" in file.read(START):
                raise ValueError(f"{path} is not a text file in UTF-8 (it holds zero bytes): save it as UTF-8.")
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error}).") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}).") from None


def _text(path: Path) -> str:
    with _opened(path) as file:
        return file.read().replace("\r\n", "\n").replace("\r", "\n")


def _paragraphs(text: str) -> list[str]:
    parts = re.split(r"\n\s*\n", text) if re.search(r"\n\s*\n\s*\S", text.strip()) else text.split("\n")
    return [part.strip() for part in parts if part.strip()]


def _lines(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"Line {number} of {path} is not valid JSON ({error}); in JSON Lines each line is, and a "
                        "document over several lines ends in .json."
                    ) from None


def _document(path: Path, split: str) -> Iterable[Any]:
    """Return the rows of a JSON document: a list, a list by name, or texts by name, which are cut into paragraphs."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines by another name
            return _lines(path)
        raise ValueError(f"{path} is not valid JSON ({error}); JSON Lines files end in .jsonl.") from None
    if isinstance(content, list):
        return [content] if is_chat(content) else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a list of texts or rows.")
    return _named_rows(content, path, split)


def _named_rows(content: dict[str, Any], path: Path, split: str) -> list[Any]:
    if any(is_chat(content.get(name)) for name in COLUMNS):
        return [content]
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if split in lists:
        return lists[split]
    parts = [value if isinstance(value, list) else [value] for value in content.values()]
    if all(isinstance(text, str) for part in parts for text in part):
        return [paragraph for part in parts for text in part for paragraph in _paragraphs(text)]
    if len(lists) == 1:
        return next(iter(lists.values()))
    held = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in content.items())
    raise ValueError(
        f"{path} is an object with {held:.500}: of several lists name the one to read (--split), or write a list of "
        "texts or rows."
    )


def _table(path: Path, delimiter: str) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KB that a cell is allowed else
    try:
        with _opened(path) as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len({*names}) < len(names):
                raise ValueError(f"{path} names a column twice: {', '.join(map(repr, names))}.")
            for cells in reader:
                if len(cells) not in (0, len(names)):
                    raise ValueError(
                        f"Line {reader.line_num} of {path} has {len(cells)} cells, its head names {len(names)}: a "
                        "cell that holds the delimiter or a line break stands in double quotes."
                    )
                if cells:
                    yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table ({error}).") from None
    finally:
        csv.field_size_limit(limit)
