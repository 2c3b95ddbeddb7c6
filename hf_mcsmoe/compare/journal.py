"""The finished cells of a comparison on disk, a JSON object a line, and what they were measured with."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mcsmoe.compare.cells import Cell
from hf_mcsmoe.files import write_text
from hf_mcsmoe.layers.output import check_path

FILE = "cells.jsonl"
# What else lies in the folder, and goes when a comparison begins anew.
OUTPUTS, SCORES = ("compare.csv", "compare.json", "report.html"), "scores-{seed}.safetensors"
CONDITIONS = "conditions"
WAY_OUT = "name another --output, ask for the same again, or pass --overwrite to begin anew"


@dataclass
class Journal:
    """The folder of a comparison: `conditions` that all its cells share, and the cells by their keys.

    A cell is there once its line is whole: a process that is killed loses no more than the cell that it was at.
    """

    folder: Path
    conditions: dict[str, Any] = field(default_factory=dict)
    cells: dict[tuple[str, str, int], Cell] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Journal":
        """Return what lies in a folder; an empty one where nothing does. A line that was cut off is left out.

        Raises:
            ValueError: the folder holds something else.
        """
        target = check_path(folder)
        journal, file = cls(target), target / FILE
        if target.is_file():
            raise ValueError(f"{target} is a file: name a folder.")
        if not file.is_file():
            if target.is_dir() and any(not item.name.startswith(".") for item in target.iterdir()):
                raise ValueError(f"{target} exists, and holds no comparison: name another folder.")
            return journal
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
        try:
            for line in [*lines, *([rest] if _is_whole(rest) else [])]:
                journal._take(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): pass --overwrite to begin anew.") from None
        return journal

    def _take(self, entry: Mapping[str, Any]) -> None:
        if CONDITIONS in entry:
            self.conditions = joined(self.conditions, entry[CONDITIONS])
        else:
            cell = Cell.from_dict(entry)
            self.cells[cell.key] = cell

    def check(self, conditions: Mapping[str, Any]) -> None:
        """Check that cells measured under these conditions can stand beside those that there are.

        Raises:
            ValueError: they differ; the message says in what.
        """
        if told := difference(self.conditions, conditions):
            raise ValueError(f"{self.folder} holds a comparison with {told}: {WAY_OUT}.")

    def begin(self, conditions: Mapping[str, Any], *, anew: bool) -> None:
        """Write the conditions, and with `anew` remove all that there was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if anew:
            seeds = self.folder.glob(SCORES.format(seed="*"))
            for path in [*seeds, *(self.folder / name for name in (FILE, *OUTPUTS))]:
                path.unlink(missing_ok=True)
            self.conditions, self.cells = {}, {}
        joint = joined(self.conditions, conditions)
        self.conditions = joint
        # Written anew, for the last line may have been cut off.
        lines = [{CONDITIONS: joint}, *(cell.to_dict() for cell in self.cells.values())]
        write_text(self.folder / FILE, "".join(map(_line, lines)))

    def append(self, cell: Cell) -> None:
        """Keep a finished cell: it is on the disk when this returns."""
        self.cells[cell.key] = cell
        with (self.folder / FILE).open("ab", buffering=0) as file:
            file.write(_line(cell.to_dict()).encode("utf-8"))
            os.fsync(file.fileno())


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def joined(held: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions of both, of which what is known by a name or a seed may be more in either."""
    found = {**held, **asked}
    for name, value in held.items():
        if isinstance(value, Mapping) and isinstance(asked.get(name), Mapping):
            found[name] = {**value, **asked[name]}
    return found


# What may change between runs, of which each cell is what it was then.
FREE = ("versions",)


def difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say which condition differs between those held and those asked for; "" where none does.

    Of methods and draws those count that both know; of other conditions all.
    """
    for name in [name for name in asked if name in held and name not in FREE]:
        before, now = held[name], asked[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            if name == "texts" and list(before) != list(now):
                return f"the texts {', '.join(before)}, not {', '.join(now)}"
            other = [key for key in now if key in before and before[key] != now[key]]
            if other:
                return f"another {_words(name)} {other[0]}"
        elif before != now:
            return f"{_words(name)} {before!r}, not {now!r}"
    return ""


def _words(name: str) -> str:
    return {
        "texts": "text of",
        "metric": "task",
        "draws": "calibration text of seed",
        "methods": "make of the method",
    }.get(name, name)
