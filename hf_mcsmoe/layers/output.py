"""Checking, before any work, where a result is to be written."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from hf_mcsmoe.modeling.folders_mcsmoe import WORK

# One or several names of what is read; None where there is none.
Read = str | os.PathLike | Sequence[str] | None


def check_apart(output: str | os.PathLike, sources: Mapping[str, Read]) -> None:
    """Raise ValueError where an output is one of the folders that are read, by the way they are called, or lies in it.

    Names that are no folders here are those of the Hub.
    """
    target = Path(os.path.realpath(output))
    for what, names in sources.items():
        several = [names] if isinstance(names, str | os.PathLike) else names or ()
        for folder in (Path(os.path.realpath(name)) for name in several if name):
            if folder.is_dir() and (target == folder or folder in target.parents):
                where = "is" if target == folder else "lies in"
                raise ValueError(
                    f"{output} {where} the folder of {what}, which is to stay as it is: name another folder."
                )


def check_path(path: str | os.PathLike) -> Path:
    """Return a path to write to, with a user's own folder for `~`.

    Raises:
        ValueError: it is no UTF-8, which the files of a model are named in, longer than the disk takes, or a link that
            leads back to itself.
    """
    target = Path(path).expanduser()
    try:
        os.fspath(target).encode()
        os.path.realpath(target, strict=True)
    except UnicodeEncodeError:
        raise ValueError(f"{os.fsencode(target)!r} is no UTF-8: name a path of other letters.") from None
    except FileNotFoundError:
        return target
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise ValueError(
                f"{_shortened(target)} cannot be written ({error.strerror}): name another path."
            ) from None
    return target


def _shortened(path: Path) -> str:
    text = os.fspath(path)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-20:]}"


def check_output(
    path: str | os.PathLike,
    *,
    overwrite: bool,
    needed_bytes: int,
    apart: Mapping[str, Read] = MappingProxyType({}),
) -> Path:
    """Return the output folder after making sure, before any work, that a result can be written there.

    Args:
        apart: what is read, see `check_apart`.

    Raises:
        ValueError: it exists and is not empty (without `overwrite`), is a file, is or lies in a folder that is read,
            has a name that no disk takes, cannot be written, or the disk is too small for `needed_bytes`.
    """
    target = check_path(path)
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder.")
    check_apart(target, apart)
    if target.is_dir() and not overwrite and any(not item.name.endswith(WORK) for item in target.iterdir()):
        raise ValueError(f"{target} exists and is not empty; choose another folder or pass --overwrite.")
    existing = _existing(target)
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file, so {target} cannot be a folder; choose another --output.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written to; choose another --output.")
    check_room(target, needed_bytes, "The result takes")
    return target


def check_room(target: Path, needed_bytes: int, told: str, advice: str = "") -> None:
    """Raise ValueError where the disk of a place has less than so many bytes free.

    Args:
        told: what takes them, as the begin of a sentence.
        advice: what takes less.
    """
    existing = _existing(target)
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"{told} about {needed_bytes / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free{advice}."
        )


def _existing(target: Path) -> Path:
    """Return a path or the lowest folder above it that is there."""
    return next(parent for parent in (target, *target.absolute().parents) if parent.exists())
