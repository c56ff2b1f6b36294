"""The C library's memory, kept by a process that trains on a CPU."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's names of what `mallopt` sets (malloc.h)."""


def keep_freed_memory() -> bool:
    """Lets glibc hold on to what tensors free, until the process ends.

    By default every large tensor is mapped anew and given back at once, and the kernel fills it with zeros each time: a
    third of the sample recipe's step (benchmarks/step.py). PyTorch has a caching allocator for GPUs alone.

    Returns:
        Whether it was done; other C libraries know no such wish.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
