"""Memory that this process may still take: the system's, or that of a control group around it if that is less."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of a control group's folder by version: its limit, what it uses, and how the pages that can be given back are called.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that are free or can be freed; where nobody says, all that there might be.

    Args:
        root: of the file system that `proc` and `sys` are read from.
    """
    free = [bytes_of_field(root / "proc/meminfo", "MemAvailable")]
    for version, folder in _groups(root):
        free += [_free_in(level, version) for level in (folder, *folder.parents) if level.is_relative_to(root / "sys")]
    known = [value for value in free if value is not None]
    return max(0, min(known)) if known else _installed()


def bytes_of_field(file: Path, field: str) -> int | None:
    """Return what a file of lines like `MemAvailable: 12 kB` says; None where it says nothing."""
    return next((1024 * int(words[1]) for words in _lines(file) if words[0] == f"{field}:"), None)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of the control groups that this process is in, with their versions.

    In a container they may be named as the host names them, and not be there; the folders above them are.
    """
    place = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
            if "memory" in controllers.split(","):
                yield 1, place.joinpath("memory", *parts)
            elif number == "0":
                yield 2, place.joinpath(*parts)


def _free_in(folder: Path, version: int) -> int | None:
    """Return what a control group leaves: its limit without what it uses, pages of files not in use left out."""
    limit, used, pages = FILES[version]
    with contextlib.suppress(OSError, ValueError):  # there is no such group, or no limit ("max")
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        idle = next((int(words[1]) for words in _lines(folder / "memory.stat") if words[0] == pages), 0)
        return most - max(0, taken - idle)
    return None


def _lines(file: Path) -> list[list[str]]:
    with contextlib.suppress(OSError):
        return [line.split() for line in file.read_text().splitlines() if line.strip()]
    return []


def _installed() -> int:
    """Return the bytes of memory that the machine has, or as many as there might be."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sys.maxsize
