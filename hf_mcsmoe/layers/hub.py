"""Tensors of a checkpoint on the Hub, read one by one: no file is downloaded but the index."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

# What the Hub answers for files that are not there or may not be read; other answers may be others a while later.
ABSENT = (400, 401, 403, 404, 410, 416, 451)
SECONDS = constants.HF_HUB_DOWNLOAD_TIMEOUT


class HubError(OSError):
    """The Hub cannot be reached, or answers that it fails: the same may work later."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository of the Hub, as far as reading tensors takes a `Path`."""

    repo_id: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name} of {self.repo_id}"

    def open(self, mode: str = "rb") -> Any:
        """Return the file, of which only what is read is fetched."""
        return Ranges(self)

    @property
    def url(self) -> str:
        """Where it is."""
        return hf_hub_url(self.repo_id, self.name, revision=self.revision)

    def exists(self) -> bool:
        """Tell whether the repository has it, and it may be read.

        Raises:
            HubError: the Hub cannot be reached.
        """
        try:
            get_hf_file_metadata(self.url)
        except Exception as error:  # whatever the network says
            if _is_absence(error):
                return False
            raise HubError(f"Cannot tell whether there is {self} ({_line(error)}).") from None
        return True

    @cached_property
    def size(self) -> int:
        """Its length in bytes.

        Raises:
            ValueError: there is no such file, or it may not be read.
            HubError: the Hub cannot be reached.
        """
        try:
            return get_hf_file_metadata(self.url).size or 0
        except Exception as error:  # whatever the network says
            raise _unreadable(self, error) from None


class Ranges(io.RawIOBase):
    """A file on the Hub, opened to be read from place to place."""

    def __init__(self, file: HubFile) -> None:
        """Stand at the start of a file."""
        self.file, self.place = file, 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the start."""
        self.place = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the present place on, and go on behind that.

        Raises:
            ValueError: there is no such file, it may not be read, or the Hub does not send what was asked for.
            HubError: the Hub cannot be reached.
        """
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            return 0
        wanted = f"bytes={self.place}-{self.place + view.nbytes - 1}"
        try:
            reply = http_backoff(
                "GET", self.file.url, headers={**build_hf_headers(), "Range": wanted}, timeout=SECONDS, max_retries=2
            )
            hf_raise_for_status(reply)
        except Exception as error:
            raise _unreadable(self.file, error) from None
        if reply.status_code != 206 or len(reply.content) > view.nbytes:
            raise ValueError(f"Cannot read parts of {self.file}: the server sends whole files; download it first.")
        view[: len(reply.content)] = reply.content
        self.place += len(reply.content)
        return len(reply.content)


def _is_absence(error: Exception) -> bool:
    """Tell whether an error says that a file is not there or may not be read, rather than that the Hub fails."""
    reply = error.response if isinstance(error, HfHubHTTPError) else None
    return isinstance(error, EntryNotFoundError) or (reply is not None and reply.status_code in ABSENT)


def _unreadable(file: HubFile, error: Exception) -> Exception:
    kind = ValueError if _is_absence(error) else HubError
    return kind(f"Cannot read {file} ({_line(error)}).")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
