"""Memory that is freed, returned to the system."""

import ctypes
import functools

# Of <malloc.h>: from how many bytes on memory is mapped by itself, and unmapped when it is freed.
M_MMAP_THRESHOLD = -3
LARGE = 2**17


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
