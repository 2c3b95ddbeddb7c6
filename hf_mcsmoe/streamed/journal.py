"""What a streamed run has finished, on disk, so that the same command goes on where it was killed."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_mcsmoe.files import read_json, write_json
from hf_mcsmoe.layers.checkpoint import INDEX
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.snapshot import Snapshot
from hf_mcsmoe.modeling.folders_mcsmoe import WORK, work_place

# Inside of the working folder beside the output.
PLACE, FILE = "streamed", "journal.json"
VERSION = 5
# The states of a run in their order: it takes statistics, measures what choices cost, compares budgets, lets ranks
# compete, makes block after block, or puts the result in its place.
STATISTICS, CURVES, BUDGETS, RANKS, BLOCKS, RESULT = "statistics", "curves", "budgets", "ranks", "blocks", "result"
# Beside the blocks that have passed while it takes statistics, those that were gone back through for gradients.
GONE_BACK = "gone back"
# What the run has fetched into the cache of the Hub, in a file of its own: it is told while blocks are made.
FETCHED = "fetched.json"
# Folders in the run's of the processes that share its first sweep, each with a journal of its own.
PARTS = f".rank-*{WORK}"
# What tells the statistics that the run has written to a file, or is about to.
SCORES = "scores"
AGAIN = "--restart (restart=True) begins anew"


class Journal:
    """The journal of one run. A block is finished once it is in here."""

    def __init__(self, work: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open the journal in a working folder, or begin one.

        Args:
            run: what decides on the result, by name.
            restart: whether to remove what an earlier run has finished.

        Raises:
            ValueError: the earlier run was another one, or of another version; the message says what has changed.
        """
        self.folder = work / PLACE
        fetched = self._fetched()
        is_new = restart or not (self.folder / FILE).is_file()
        if is_new:  # of a run that was killed while it removed what it had kept, the rest as well
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        if is_new and fetched:  # which is still to be dropped
            write_json(self.folder / FETCHED, fetched)
        told = json.loads(json.dumps(run))
        self.content: dict[str, Any] = {
            "version": VERSION,
            "run": told,
            "state": STATISTICS,
        }
        if not is_new:
            held = read_json(self.folder / FILE, AGAIN)
            self._check(held, told)
            self.content = held
        else:
            self.save()

    def _check(self, held: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        if held.get("version") != VERSION:
            raise ValueError(
                f"{self.folder / FILE} was written by another version of hf_mcsmoe (its format is "
                f"{held.get('version')!r}, this one's {VERSION}): go on with that one, or {AGAIN}."
            )
        own = held.get(SCORES, {})
        if own and own.items() <= told.items():  # it is given what it has written itself
            told = {**told, **{name: held["run"][name] for name in own}}
        if changed := difference(held["run"], told):
            raise ValueError(
                f"A run that was interrupted is to go on, and {changed}: ask for the same again, or {AGAIN}."
            )

    @property
    def state(self) -> str:
        """Which state the run is in."""
        return self.content["state"]

    @state.setter
    def state(self, state: str) -> None:
        self.content["state"] = state
        self.save()

    def save(self) -> None:
        """Write it, whole or not at all."""
        write_json(self.folder / FILE, self.content)

    def follow(self, snapshot: Snapshot) -> None:
        """Keep what the run fetches from the Hub, however often it goes on: that alone is its own to drop."""
        snapshot.follow(self._fetched(), partial(write_json, self.folder / FETCHED))

    def _fetched(self) -> dict[str, Any]:
        """Return what was fetched for the run, by those too that shared its first sweep and had not handed it over."""
        files = [self.folder / FETCHED, *self.folder.glob(f"{PARTS}/{PLACE}/{FETCHED}")]
        return {name: own for file in files if file.is_file() for name, own in read_json(file, AGAIN).items()}

    def check_source(self, folder: Folder) -> None:
        """Raise ValueError where the source has changed since the run began."""
        held, found = self.content["run"]["source"], source_of_run(folder)
        if other := [name for name in held if held[name] != found.get(name)]:
            raise ValueError(
                f"{other[0]} of {folder.model.name_or_path} has changed while it was read: begin anew when nobody "
                "writes to it (--restart)."
            )

    def remove(self) -> None:
        """Remove all that the run has kept; it is finished from the first moment on."""
        (self.folder / FILE).unlink()
        shutil.rmtree(self.folder)


def is_begun(output: str | os.PathLike) -> bool:
    """Tell whether a run to this output was interrupted, and can go on."""
    with contextlib.suppress(OSError):  # a name that no disk takes, which others refuse
        return (place_of(output) / FILE).is_file()
    return False


def forget(output: str | os.PathLike) -> bool:
    """Remove what an interrupted run to this output has finished; returns whether there was anything."""
    is_there = place_of(output).is_dir()
    shutil.rmtree(place_of(output), ignore_errors=True)
    return is_there


def commit_of(output: str | os.PathLike) -> str | None:
    """Return the commit of the Hub that an interrupted run to this output reads; None where there is none."""
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return _content(output)["run"]["source"].get("commit")
    return None


def finished_bytes(output: str | os.PathLike) -> int:
    """Return the bytes of shards that an interrupted run to this output has written, of which results are made."""
    return _bytes_of(output, "[0-9]*/*.safetensors")


def needed_bytes(
    output: str | os.PathLike, result: int, hidden: int, copies: int = 0, back: int = 0, *, restart: bool = False
) -> int:
    """Return how many bytes more a run to this output takes on disk at most, where one may have been interrupted.

    Args:
        result: bytes of all shards that will be there.
        hidden: of hidden states between two blocks; those before a block stay until it is finished.
        copies: of those of trials, alike; they are gone when the sweep after theirs begins.
        back: of those that wait for gradients while statistics are taken, before there is anything else.
        restart: whether what an interrupted run holds is removed before.
    """
    if restart:
        return max(back, 2 * hidden + max(result, 2 * copies)) - _bytes_of(output, "**/*")
    state = state_of(output)
    copies = copies if state in (None, STATISTICS, CURVES) else 0
    back = back if state in (None, STATISTICS) else 0
    held = finished_bytes(output) + _bytes_of(output, "**/?????.*")
    return max(0, max(back, 2 * hidden + max(result, 2 * copies)) - held)


def _bytes_of(output: str | os.PathLike, files: str) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in place_of(output).glob(files) if file.is_file())
    return 0


def is_placing(output: str | os.PathLike) -> bool:
    """Tell whether a run was interrupted while its result took its place, which it may have done in part."""
    return state_of(output) == RESULT


def state_of(output: str | os.PathLike) -> str | None:
    """Return the state that a run to this output was interrupted in; None where there was none."""
    return _content(output).get("state")


def has_written(output: str | os.PathLike, told: Mapping[str, Any]) -> bool:
    """Tell whether an interrupted run to this output that was given no statistics has written those that are told."""
    content = _content(output)
    return content.get(SCORES) == told and content["run"]["statistics"] is None


def _content(output: str | os.PathLike) -> dict[str, Any]:
    """Return what the journal of an interrupted run to this output holds; nothing where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((place_of(output) / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def place_of(output: str | os.PathLike) -> Path:
    """Return the folder of what a run to this output has finished."""
    return work_place(Path(os.path.realpath(output))) / PLACE


def difference(held: Any, asked: Any, name: str = "") -> str:
    """Say in what two descriptions of a run differ first; "" where they do not."""
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in [*held, *(key for key in asked if key not in held)]:
            if told := difference(held.get(key), asked.get(key), f"{name} {key}".strip()):
                return told
        return ""
    return "" if held == asked else f"{name} was {_shown(held)}, and is {_shown(asked)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."


def source_of_run(folder: Folder) -> dict[str, Any]:
    """Return what tells a checkpoint from any other: its files' sizes and times, and what describes them.

    Of the Hub it is the commit.
    """
    if folder.snapshot is not None:
        return {"commit": folder.snapshot.commit}
    place = folder.place
    files = sorted({tensor.file for tensor in folder.stored.values() if isinstance(tensor.file, Path)})
    found: dict[str, Any] = {file.name: stamp(file) for file in files}
    for name in ("config.json", INDEX):
        if (place / name).is_file():
            found[name] = hashlib.sha256((place / name).read_bytes()).hexdigest()[:16]
    return found


def stamp(file: Path) -> list[int]:
    """Return size and time of a file, which change with it."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256_of(file: Path) -> str:
    """Return the hash of a file's contents."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
