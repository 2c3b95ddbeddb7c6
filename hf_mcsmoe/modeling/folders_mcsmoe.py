"""Folders that are complete or not there, each written by one process. This file travels with every checkpoint."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi

from .companions_mcsmoe import kind_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

WORK, LOCK, RESULT = ".mcsmoe-work", "lock", "result"
# Longer names are told by a hash, for `.<name>.mcsmoe-work` has to fit where `<name>` does.
LONGEST = 100
# Without it, nothing in a folder loads.
CONFIG = "config.json"
# Arguments of `push_to_hub` that describe the commit.
COMMIT_ARGUMENTS = ("commit_message", "commit_description", "revision", "create_pr")
# Working folders that this process holds.
_held: set[Path] = set()


@contextlib.contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """Yield the folder beside `target` in which its contents are made; for the block, this process alone has it.

    A result that a killed process left in it is removed. At the end the folder goes, unless something is kept in it.
    Within the block, the same process gets the same folder again.

    Raises:
        ValueError: another process holds it.
    """
    folder = work_place(target)
    if folder in _held:
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _locked(folder, target)
    _held.add(folder)
    try:
        shutil.rmtree(folder / RESULT, ignore_errors=True)
        yield folder
    finally:
        _held.discard(folder)
        shutil.rmtree(folder / RESULT, ignore_errors=True)
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        for path in dict.fromkeys([folder, *made]):
            with contextlib.suppress(OSError):  # something is kept in there
                path.rmdir()


def work_place(target: Path) -> Path:
    """Return where to work: beside `target`, or in it where that cannot be renamed into, as a mounted folder."""
    parent = target.parent
    if target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK)):
        parent = target
    name = os.fsencode(target.name)
    told = target.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()[:32]
    return parent / f".{told}{WORK}"


def _locked(folder: Path, target: Path) -> int:
    """Create a folder with a lock in it that dies with this process; returns the lock's open file."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:  # whoever held it has just removed it
            continue
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(
                f"Another run is writing to {target}: wait until it has ended, or name another folder."
            ) from None
        except OSError:  # a disk without locks
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
                return lock
        os.close(lock)


@contextlib.contextmanager
def completed_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder; what is in it is in `target` once the block ends without an error.

    A new `target` is there at once. In one that exists, the configuration goes first and the new one comes last, so
    that a killed process leaves the old model, the new one, or none that loads; what is not the model's own stays.
    """
    with working_folder(target) as folder:
        new = folder / RESULT
        new.mkdir()
        try:
            yield new
            follow_umask(new)
            if any(new.iterdir()):
                _install(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Let the files of a folder be readable by whom the umask says, as it is; some writers make them private."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError):  # a disk without modes
                file.chmod(mode)


def _install(new: Path, target: Path) -> None:
    """Move what is in `new` to `target`, which loads before and afterwards, and in between not at all."""
    if not target.is_dir():
        os.rename(new, target)
        return
    if (new / CONFIG).exists():
        (target / CONFIG).unlink(missing_ok=True)
    files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    replaced = {_whole(file.parts[0]) for file in files} - {None}
    for path in target.iterdir():
        if _whole(path.name) in replaced:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for file in sorted(files, key=lambda file: file.name == CONFIG):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / file, target / file)


def _whole(name: str) -> str | None:
    """Return of what a file is a part that cannot be exchanged by itself: weights, a tokenizer; None for others."""
    return weights_name(name) or kind_of(name)


def weights_name(name: str) -> str | None:
    """Return "model.safetensors" for it, its shards and its index (likewise for a variant); None for other files."""
    found = re.fullmatch(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.\w+)?\.json)?", name)
    return f"{found[1]}{found[4] or ''}.safetensors" if found else None


def repository(
    repo_id: str, private: bool | None, token: bool | str | None, revision: str | None
) -> tuple[HfApi, str]:
    """Create the repository and the branch if need be; returns what talks to it and its full name."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api, repo_id
