"""Keeps freed memory in a process that trains on a CPU."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's parameter numbers for `mallopt` (malloc.h)."""


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory of freed tensors until the process ends.

    By default every large tensor is mapped anew and unmapped when freed, and the kernel fills it with zeros each time:
    a third of the sample recipe's step (benchmarks/step.py). PyTorch has a caching allocator for GPUs only.

    Returns:
        Whether it worked; other C libraries have no such option.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
