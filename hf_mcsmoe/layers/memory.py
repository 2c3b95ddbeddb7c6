"""Memory of weights: freed, it goes back to the system; mapped from a file, they may lie as no kernel expects.

And of kernels: few are kept.
"""

import ctypes
import functools
import os
from itertools import chain

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Of <malloc.h>: from how many bytes on memory is mapped by itself, and unmapped when it is freed.
M_MMAP_THRESHOLD = -3
LARGE = 2**17
# Where Torch places what it allocates: at multiples of so many bytes.
ALIGNED = 64


@functools.cache
def return_freed_memory() -> bool:
    """Let every tensor of 128 kB or more go back to the system when it is freed; return whether that could be set.

    glibc raises the bound by itself, to 32 MB, when a larger block is freed. The matrices of experts then lie in its
    heap, which does not shrink behind the last one in use: a block of 1.2 GB held twice as much after it was freed.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
    except (AttributeError, OSError):  # another C library
        return False


def align(model: nn.Module) -> None:
    """Copy weights of a model on the CPU that do not lie where Torch would have placed them; values stay.

    Those that are mapped from a file lie as they lie in it, and kernels of other alignments add in another order: the
    same model in memory and read block by block would differ in last bits.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if _is_plain(tensor) and tensor.data_ptr() % ALIGNED:
            tensor.data = tensor.data.clone()


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = tensor.layout is torch.strided and not isinstance(tensor, DTensor)
    return is_dense and tensor.device.type == "cpu"


def keep_few_kernels() -> None:
    """Let torch keep 64 kernels of products in bfloat16 on a CPU, where the environment says nothing else.

    oneDNN makes one for each number of rows, which differs with every expert, and keeps the last 1,024 of them in each
    of two places: some 800 MB, beside a block that is freed.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
