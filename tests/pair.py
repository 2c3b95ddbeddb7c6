"""Two processes of this test's own that work together: copies of the one that runs the tests."""

import json
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a process found, as JSON values; or of one that failed, its traceback.
Found = Any


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(rank: int, port: int, work: Callable[[int], Found], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        found = work(rank)
    except BaseException:
        found = {"failed": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # without what the tests' own process would do at its end


def in_two_processes(work: Callable[[int], Found], folder: Path, timeout: float = 120.0) -> list[Found]:
    """Return what `work(rank)` finds in each of two processes; None of one that ended by itself."""
    context, port = multiprocessing.get_context("fork"), free_port()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of a process with threads, which do not run
        parts = [context.Process(target=_run, args=(rank, port, work, folder)) for rank in range(2)]
        for part in parts:
            part.start()
    for part in parts:
        part.join(timeout)
        assert part.exitcode is not None, "a process hangs"
    files = [folder / f"{rank}.json" for rank in range(2)]
    found = [json.loads(file.read_text()) if file.is_file() else None for file in files]
    failed = [one["failed"] for one in found if isinstance(one, dict) and "failed" in one]
    assert not failed, "\n".join(failed)  # of one that the other left alone, and of that
    return found
