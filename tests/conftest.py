"""Settings of every test: one thread, no network, remote code copied to a folder of this run."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mcsmoe-modules-")
# Bit for bit means the same kernels, and MKL chooses some of them by where in memory a tensor lies, which for one
# read from a file is elsewhere.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import shutil

import torch

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Remove the copied code."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
