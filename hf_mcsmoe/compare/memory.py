"""How much memory a step takes at most: of the accelerator where the model is on one, else of the process."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Written to the second of these files, it lets the system forget the peak so far.
FORGET = "5"


def measured_by(device: torch.device) -> str:
    """Say what `peak_memory` counts for a model on `device`."""
    if device.type == "cuda":
        return "tensors on the accelerator (torch.cuda.max_memory_allocated), from the beginning of each cell on"
    if _forgets():
        return (
            "resident memory of the process (VmHWM), the original model included, from the beginning of each cell on"
        )
    return "resident memory of the process (ru_maxrss) since it was started"


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the most bytes held since the block began; see `measured_by`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        yield _resident_peak if _forgets() else _peak_of_process


def _forgets() -> bool:
    """Make the system forget the peak so far; whether it does."""
    try:
        RESET.write_text(FORGET)
    except OSError:
        return False
    return STATUS.exists()


def _resident_peak() -> int | None:
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def _peak_of_process() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
