"""What this process holds, and how fast this machine multiplies and reads."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from hf_mcsmoe.forecast.memory import bytes_of_field

STATUS = Path("/proc/self/status")
# Bytes of the file that is read where there is none of the model's; seconds that each measurement takes at most.
PROBE, SECONDS = 256 * 2**20, 1.4
# The largest width of the assignment and of the decomposition that are timed.
WIDTH = 512
# Rows of the products in single precision that are timed.
ROWS = 256
# Bytes that are copied into memory that the system gives anew.
COPIED = 2**26


@dataclass(frozen=True)
class Pace:
    """How fast a machine is: operations a second of products in the model's dtype, in `single` and `double` precision.

    Those in double are judged as a repair does it. Bytes read and bytes copied a second. And seconds: `assignment` of
    one alignment, and `decomposition` of one symmetric matrix, each of `width`.
    """

    products: float
    single: float
    double: float
    reading: float
    copying: float
    assignment: float
    decomposition: float
    width: int


def resident(field: str = "VmRSS") -> int | None:
    """Return the bytes that this process holds, or held at most (`VmHWM`); None where nobody tells."""
    return bytes_of_field(STATUS, field)


def measure_pace(tokens: int, hidden_size: int, width: int, dtype: torch.dtype, folder: Path | None = None) -> Pace:
    """Measure this machine for less than ten seconds.

    Args:
        tokens: that an expert sees at a time; products are of the shapes that experts have.
        folder: of the model, one of whose weight files is read; without, a file is written and read.
    """
    states, weight = torch.randn(tokens, hidden_size).to(dtype), torch.randn(width, hidden_size).to(dtype)
    seconds = _fastest(lambda: nn.functional.linear(states, weight))
    size = min(width, WIDTH)
    costs = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    symmetric = costs @ costs.T
    floats, output = torch.randn(ROWS, hidden_size), torch.randn(hidden_size, size)
    start = output.double()
    return Pace(
        products=2 * tokens * hidden_size * width / seconds,
        single=2 * ROWS * hidden_size * size / _fastest(lambda: floats @ output),
        double=2 * hidden_size * size**2 / _fastest(lambda: ((start @ symmetric - 2 * start) * start).sum()),
        reading=_reading(folder),
        copying=COPIED / _fastest(torch.zeros(COPIED, dtype=torch.uint8).clone),
        assignment=_fastest(lambda: linear_sum_assignment(costs.numpy())),
        decomposition=_fastest(lambda: torch.linalg.eigh(symmetric)),
        width=size,
    )


def _fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, once each is warm: those that this thread worked.

    So what else runs on the machine meanwhile does not count.
    """
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return best if best < float("inf") else SECONDS


def _reading(folder: Path | None) -> float:
    """Return the bytes a second at which a weight file is read that the system does not hold in memory."""
    files = sorted((folder or Path("/nonexistent")).glob("*.safetensors"))
    if files:
        return _rate(files[-1])
    with tempfile.NamedTemporaryFile(dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None) as file:
        file.write(os.urandom(2**20) * (PROBE // 2**20))
        file.flush()
        os.fsync(file.fileno())
        return _rate(Path(file.name))


def _rate(file: Path) -> float:
    done, begin = 0, time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while time.perf_counter() - begin < SECONDS and (part := opened.read(2**24)):
            done += len(part)
    return max(done, 1) / max(time.perf_counter() - begin, 1e-6)
