"""Tensors of a checkpoint on the Hub, read one by one: no file is downloaded but the index."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, http_backoff

SECONDS = constants.HF_HUB_DOWNLOAD_TIMEOUT


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
        """Tell whether the repository has it; not where the Hub cannot be reached."""
        try:
            get_hf_file_metadata(self.url)
        except Exception:  # whatever the network says
            return False
        return True

    @cached_property
    def size(self) -> int:
        """Its length in bytes.

        Raises:
            ValueError: there is no such file, or the Hub cannot be reached.
        """
        try:
            return get_hf_file_metadata(self.url).size or 0
        except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
            raise ValueError(f"Cannot read {self} ({_line(error)}).") from None


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
            ValueError: the Hub cannot be reached, or does not send what was asked for.
        """
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            return 0
        wanted = f"bytes={self.place}-{self.place + view.nbytes - 1}"
        try:
            reply = http_backoff(
                "GET", self.file.url, headers={**build_hf_headers(), "Range": wanted}, timeout=SECONDS, max_retries=2
            )
            reply.raise_for_status()
        except Exception as error:
            raise ValueError(f"Cannot read {self.file} ({_line(error)}).") from None
        if reply.status_code != 206 or len(reply.content) > view.nbytes:
            raise ValueError(f"Cannot read parts of {self.file}: the server sends whole files; download it first.")
        view[: len(reply.content)] = reply.content
        self.place += len(reply.content)
        return len(reply.content)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
