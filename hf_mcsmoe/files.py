"""Files that are written whole or not at all."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a file's name, so many bytes are told in that of its successor, which must not become too long.
TOLD = 100


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yield where to write a file; it takes the place of `path` once the block ends without an error.

    Until then, and after a kill, `path` is what it was. The new file lies beside it, behind a link beside what that
    points to, and is readable by whom the umask says, whatever writes it.

    Raises:
        OSError: the folder is missing or closed, or `path` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file.")
    if target.is_symlink():
        raise OSError(f"{path} is a link that leads back to itself: name a file.")
    if target.exists() and not target.is_file():  # a pipe or /dev/null, which cannot be replaced
        yield target
        return
    told = target.name.encode("utf-8", "ignore")[:TOLD].decode("utf-8", "ignore")
    new = target.with_name(f".{told}.{uuid.uuid4().hex[:12]}.mcsmoe-new")
    new.touch(exist_ok=False)
    try:
        mode = new.stat().st_mode
        yield new
        new.chmod(mode)
        _flush(new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk, so that a power cut does not leave an empty one under the name of the old."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all; see `replaced`."""
    with replaced(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON, whole or not at all; see `replaced`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike, instead: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        instead: what to do when it is deleted.

    Raises:
        ValueError: the file is cut off or no JSON object; the message says to delete it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        found = f"it holds no object but {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        found = str(error)
    raise ValueError(f"{path} is cut off or damaged ({found}): delete it, and {instead}.")


def damage(error: Exception) -> str:
    """Say in words what is wrong with a file whose values led to an error."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, ValueError):
        return str(error).rstrip(".")
    # Of a part of it that was made with names that it has not, or without those that it must have.
    return str(error).partition("__init__() ")[2] or "a value in it is of the wrong kind"
