"""The seal of a checkpoint: written last, with the size and the hash of each file and what the run is made of."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mcsmoe.files import write_json

SEAL = "mcsmoe_checkpoint.json"
FORMAT, FORMAT_VERSION = "mcsmoe-checkpoint", 1
# No run reads them: what a person may edit, and what marks a checkpoint that a signal asked for until it is written.
FREE_FILES = ("README.md", SEAL, "checkpoint-is-incomplete.txt")


def seal(folder: Path, run: Mapping[str, Any], *, resumable: bool) -> None:
    """Mark a checkpoint as complete.

    Args:
        run: what `sealed_run` returns later.
        resumable: whether the state of the optimizer and of the random numbers is in it.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "resumable": resumable,
        "run": run,
        "files": {name: [file.stat().st_size, _sha256(file)] for name, file in _files(folder).items()},
    }
    write_json(folder / SEAL, content)


def is_sealed(folder: Path) -> bool:
    """Tell whether a checkpoint was written to its end, whatever has become of it since."""
    return (folder / SEAL).is_file()


def flaw(folder: Path, *, thorough: bool = True, resumed: bool = True) -> str:
    """Say why no run can go on from a checkpoint; "" where it is whole.

    Args:
        thorough: whether the files are read, or only their sizes.
        resumed: whether the state of the training is needed, or only the weights.
    """
    if not is_sealed(folder):
        return f"it was not written to its end (it has no {SEAL})"
    try:
        content = _read(folder)
        if resumed and not content["resumable"]:
            return "it was saved without optimizer and random state (save_only_model)"
        found = (_file_flaw(folder / name, expected, thorough) for name, expected in content["files"].items())
        return next(filter(None, found), "")
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {SEAL} is damaged"


def sealed_run(folder: Path) -> dict[str, Any]:
    """Return what the run of a whole checkpoint is made of."""
    return _read(folder)["run"]


def _read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    if content["format"] != FORMAT or content["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{folder / SEAL} was written by another version.")
    return content


def _files(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path for name, path in named.items() if name not in FREE_FILES}


def _file_flaw(file: Path, expected: list, thorough: bool) -> str:
    size, sha256 = expected
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size:,} bytes instead of {size:,}"
    if thorough and _sha256(file) != sha256:
        return f"{file.name} is damaged: its bytes are not those that were written"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
