"""Standard output and error that may be closed or full, and signals: neither decides whether a result is saved."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Tolerant(io.TextIOBase):
    """A stream that takes what is written until the one behind it fails, and then drops the rest."""

    def __init__(self, stream: Any) -> None:
        """Write to `stream`; None where the process was started without one."""
        self.stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return "utf-8" if self.stream is None else self.stream.encoding

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """Return the number of the open file."""
        if self.stream is None:
            raise io.UnsupportedOperation("This stream is closed.")
        return self.stream.fileno()

    def writable(self) -> bool:
        """Whether text can be written: always."""
        return True

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Write what waits, or drop it."""
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self.stream is None or self.error is not None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: closed by Python
            self.error = error if isinstance(error, OSError) else OSError(str(error))
            self._drain()

    def _drain(self) -> None:
        """Send what the stream still holds nowhere, or Python would fail on it when it ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[Tolerant]:
    """Let what is printed within the block get lost rather than fail; yields standard output."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tolerant(before[0]), Tolerant(before[1])
    try:
        yield sys.stdout
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def cleaning_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that what it was writing is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
