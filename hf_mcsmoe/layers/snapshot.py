"""A checkpoint of the Hub at one commit: a shard is fetched when a block needs it, and can be dropped again."""

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_mcsmoe.layers.checkpoint import INDEX, WEIGHTS, StoredTensor, tensors_of_file, weight_map, without_absent
from hf_mcsmoe.layers.config_file import CONFIG, check_config_file
from hf_mcsmoe.layers.hub import HubFile
from hf_mcsmoe.modeling.companions_mcsmoe import source_folder
from hf_mcsmoe.processes import current

# Of each file in the cache what it points to, and the time of that in nanoseconds.
Own = dict[str, list[Any]]
# Headers that are asked for side by side, and bytes that are read from the Hub without fetching their shards.
REQUESTS, SMALL = 8, 16_000_000
# Of the passes over blocks in which several processes drop what all have left; all count alike.
_PASSES = count()


@dataclass(frozen=True)
class Shard(HubFile):
    """A file of weights: read from the cache of the Hub once it is there, before that from the Hub part by part."""

    snapshot: "Snapshot | None" = field(default=None, compare=False, repr=False)

    def open(self, mode: str = "rb") -> Any:
        """Return the file, opened."""
        if self.snapshot is not None:
            with contextlib.suppress(FileNotFoundError):
                return (self.snapshot.folder / self.name).open(mode)
        return super().open(mode)


class Snapshot:
    """A repository at the commit that its branch stood at first: what is fetched later is of the same."""

    def __init__(self, repo_id: str, commit: str | None = None) -> None:
        """Fetch the configuration, and all that lies beside the weights.

        Args:
            commit: that of an earlier run; None for where the main branch stands.

        Raises:
            ValueError: there is no such repository, or it is gated; see `check_config_file`.
            OSError: the Hub cannot be reached, and the cache has it not.
        """
        check_config_file(repo_id)
        self.repo_id = repo_id
        self.folder = _download(repo_id, CONFIG, commit).parent
        self.commit = self.folder.name
        # What this has fetched itself: contents and their time by file, and who is told when it changes.
        self._own: Own = {}
        self._note: Callable[[Own], object] = lambda own: None
        self._lock = threading.Lock()
        # Of each file, who may fetch it: what is being fetched ahead is waited for, and not fetched anew.
        self._turns: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        # What is to be fetched ahead and is not there yet, and who fetches.
        self._ahead: set[str] = set()
        self._threads: list[threading.Thread] = []
        # What this one of several processes needs no more, in the pass of this number; and on the way back.
        self._left: tuple[set[str], set[str]] = (set(), set())
        self._pass = next(_PASSES)
        source_folder(repo_id, self.commit)

    @property
    def _blobs(self) -> Path:
        """Where the cache keeps the contents of files, which the files of commits point to."""
        return self.folder.parents[1] / "blobs"

    def fetched(self, name: str) -> Path:
        """Return a file in the cache, after fetching it if need be.

        Raises:
            ValueError: the repository has no such file, or it may not be read.
            OSError: the Hub cannot be reached, or the disk is full.
        """
        file = self.folder / name
        with self._turns[name]:
            if file.is_file():
                return file
            before = set(_files_in(self._blobs))
            file = _download(self.repo_id, name, self.commit)
            content = Path(os.path.realpath(file))
            if content not in before:
                with self._lock:
                    self._own[str(file)] = [str(content), content.stat().st_mtime_ns]
                    self._note(self._own)
            return file

    def follow(self, own: Own, note: Callable[[Own], object]) -> None:
        """Go on from what an earlier run has fetched, and tell `note` of that and of what is fetched."""
        with self._lock:
            self._own, self._note = {**own, **self._own}, note
            note(self._own)

    def fetch_for(self, tensors: Iterable[StoredTensor]) -> None:
        """Fetch the shards of tensors that are to be read together, unless these are small.

        Raises:
            ValueError, OSError: see `fetched`.
        """
        tensors = list(tensors)
        if sum(tensor.empty.nbytes for tensor in tensors) > SMALL:
            for name in sorted({tensor.file.name for tensor in tensors}):
                self.fetched(name)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Begin to fetch files that will be needed next; whoever needs them waits for them, or is told why not."""
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            with self._lock:
                self._ahead |= {*missing}
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(threading.Thread(target=self._fetch_quietly, args=(missing,), daemon=True))
            self._threads[-1].start()

    def _fetch_quietly(self, names: Iterable[str]) -> None:
        """Fetch what is still to be fetched ahead; what is dropped in the meantime does not come back."""
        with contextlib.suppress(Exception):
            for name in names:
                # Nobody else fetches it now; what another has fetched is there, or dropped and not ahead any more.
                with self._turns[name]:
                    if not (self.folder / name).is_file() and name in self._ahead:
                        self.fetched(name)
                        if name not in self._ahead.union(*self._left):
                            self._drop([str(self.folder / name)])

    def drop(self, names: Iterable[str], *, is_back: bool = False) -> None:
        """Remove files from the cache that were fetched for this, and no others; of several processes once all ask.

        Args:
            is_back: whether on the way back, on which what was dropped before is read once more.

        Raises:
            RuntimeError: another process ended.
        """
        names = set(names)
        with self._lock:
            self._ahead -= names
        self._drop([str(self.folder / name) for name in self._free(names, is_back=is_back)])

    def _free(self, names: set[str], *, is_back: bool) -> set[str]:
        """Return which files no process needs in this pass, of these and of those that this one has left before."""
        processes = current()
        if processes.size == 1:
            return names
        left = self._left[is_back]
        for name in names - left:
            processes.counted(f"{self._pass} {is_back} {name}", 1)
        left |= names
        own = [name for name in left if str(self.folder / name) in self._own]
        return {name for name in own if processes.counted(f"{self._pass} {is_back} {name}") == processes.size}

    def hand_over(self) -> None:
        """End a pass of several processes: the first has as its own what others fetched into the cache that it reads.

        Raises:
            RuntimeError: another process ended.
        """
        processes = current()
        self._end_ahead()
        processes.gathered(None)  # all have left what they leave
        self.drop((), is_back=bool(self._left[True]))
        parts = processes.gathered(self._own)
        here = {file: told for own in parts for file, told in own.items() if _is_there(file, *told)}
        here = processes.sent(here, 0)
        with self._lock:
            others = {file: told for file, told in self._own.items() if here.get(file) != told}
            self._own = {**here, **self._own} if processes.is_first else others
            self._note(self._own)
        self._left, self._pass = (set(), set()), next(_PASSES)

    def drop_all(self) -> None:
        """Remove all files from the cache that were fetched for this, of an earlier commit too, and fetch no more."""
        self._end_ahead()
        self._drop([*self._own])

    def _end_ahead(self) -> None:
        """Fetch no more ahead than is being fetched, and wait for that."""
        with self._lock:
            self._ahead.clear()
        for thread in self._threads:
            thread.join()

    def _drop(self, files: Iterable[str]) -> None:
        with self._lock:
            for link, (content, time) in [(Path(file), self._own.pop(file)) for file in files if file in self._own]:
                # A file that was fetched anew since, or that another commit has too, is not ours.
                if _is_there(link, content, time):
                    link.unlink(missing_ok=True)
                    if not any(os.path.realpath(other) == content for other in link.parents[1].glob(f"*/{link.name}")):
                        Path(content).unlink(missing_ok=True)
            self._note(self._own)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors of its safetensors by name; of shards that are not in the cache only headers are read.

        Raises:
            ValueError: there are no safetensors, or index, shards or a header are damaged or missing.
            OSError: see `fetched`.
        """
        names = None if self._has(WEIGHTS) else weight_map(self._index())
        shards = sorted({WEIGHTS} if names is None else {*names.values()})
        with ThreadPoolExecutor(REQUESTS) as pool:
            inside = dict(zip(shards, pool.map(self._header, shards), strict=True))
        if names is None:
            return inside[WEIGHTS]
        return without_absent(names, inside)

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file() or HubFile(self.repo_id, name, self.commit).exists()

    def _index(self) -> Path:
        try:
            return _download(self.repo_id, INDEX, self.commit)
        except ValueError as error:
            raise ValueError(
                f"{error} Weights of another format can be loaded with from_pretrained and saved as safetensors with "
                "save_pretrained."
            ) from None

    def _header(self, name: str) -> dict[str, StoredTensor]:
        file = self.folder / name
        found = tensors_of_file(file if file.is_file() else HubFile(self.repo_id, name, self.commit))
        shard = Shard(self.repo_id, name, self.commit, self)
        return {tensor: replace(stored, file=shard) for tensor, stored in found.items()}


class Passage:
    """Which shards each block reads: the next ones are fetched ahead, and those that no later block reads dropped.

    Shards with weights outside of the blocks stay, which are read at the begin and at the end.
    """

    def __init__(self, snapshot: Snapshot, shards: Mapping[str, Iterable[str]], *, drops: bool) -> None:
        """Take the files that each block reads, by its path and in the order in which they pass; "" for outside."""
        self.snapshot, self.drops = snapshot, drops
        self._shards = {path: set(names) for path, names in shards.items()}
        self._paths = [path for path in self._shards if path]
        self._last = {name: path for path in self._paths for name in self._shards[path]}
        self._first = {name: path for path in reversed(self._paths) for name in self._shards[path]}

    def entered(self, path: str, *, is_back: bool = False) -> None:
        """Fetch what the block after this one reads, or on the way back the block before."""
        order = self._paths[::-1] if is_back else self._paths
        if path in order[:-1]:
            self.snapshot.fetch_ahead(sorted(self._shards[order[order.index(path) + 1]]))

    def left(self, path: str, *, is_back: bool = False) -> None:
        """Drop what is not read any more, if that is asked for, when a block or a part of it is done.

        Of several processes a part says nothing, such as a router that is looked at before the blocks pass.
        """
        block = next((block for block in self._paths if f"{path}.".startswith(f"{block}.")), None)
        if self.drops and block is not None and (path == block or current().size == 1):
            names = self._shards[block] - self._shards.get("", set())
            last = self._first if is_back else self._last
            self.snapshot.drop((name for name in names if last[name] == block), is_back=is_back)

    def end(self) -> None:
        """End a pass that several processes share: the first has what was fetched, and the others drop what is left.

        Raises:
            RuntimeError: another process ended.
        """
        if current().size > 1:
            self.snapshot.hand_over()
            if not current().is_first:
                self.close()
                self.snapshot.follow({}, lambda own: None)

    def close(self) -> None:
        """Drop all that was fetched, if that is asked for."""
        if self.drops:
            self.snapshot.drop_all()


def _files_in(folder: Path) -> list[Path]:
    """Return the files in a folder of the cache that are whole."""
    return [file for file in folder.iterdir() if file.suffix != ".incomplete"] if folder.is_dir() else []


def _is_there(link: str | Path, content: str, time: int) -> bool:
    """Tell whether a file of a commit points to some content, which is of a time in nanoseconds."""
    with contextlib.suppress(OSError):
        return os.path.realpath(link) == content and os.stat(content).st_mtime_ns == time
    return False


def _download(repo_id: str, name: str, commit: str | None) -> Path:
    """Return a file of the Hub in the cache.

    Raises:
        ValueError: the repository has no such file or commit, or it may not be read.
        OSError: the Hub cannot be reached, or the disk is full.
    """
    try:
        return Path(hf_hub_download(repo_id, name, revision=commit))
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated: ask for access on its page of the Hub, then `hf auth login`.") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE keeps the Hub out" if constants.is_offline_mode() else "the Hub cannot be reached"
        raise OSError(f"{name} of {repo_id} is not in the cache, and {why}.") from None
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError) as error:
        what = "holds no" if isinstance(error, EntryNotFoundError) else "cannot be read any more, not its"
        raise ValueError(f"{repo_id} on the Hub {what} {name}{f' at commit {commit}' if commit else ''}.") from None
