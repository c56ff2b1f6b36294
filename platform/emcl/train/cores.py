"""Checks that each rank has as many cores as loader processes: with fewer, the GPU would wait without any message."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence

HostAndCores = tuple[str, list[int]]
"""A host's name, and its cores that a process may run on."""


def host_and_cores() -> HostAndCores:
    """The cores of this process, as schedulers and launchers bind them; a container's CPU quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return socket.gethostname(), sorted(os.sched_getaffinity(0))
    return socket.gethostname(), list(range(os.cpu_count() or 1))


def too_few_cores(of_ranks: Sequence[HostAndCores], workers: int) -> str | None:
    """A message about the rank with the fewest cores, if it has fewer than loaders; `of_ranks` are those of all ranks.

    Ranks that may run on the same core share it equally.
    """
    users = Counter((host, core) for host, cores in of_ranks for core in cores)
    shares = [sum(1 / users[host, core] for core in cores) for host, cores in of_ranks]
    rank = min(range(len(shares)), key=shares.__getitem__)
    if shares[rank] >= workers - 1e-6:
        return None
    host, cores = of_ranks[rank]
    shared = max(users[host, core] for core in cores)
    of = f", which {shared} ranks share" if shared > 1 else ""
    return (
        f"rank {rank} on {host} has {len(cores)} core(s){of}, and data.workers={workers} loaders: ask the scheduler "
        f"for more (--cpus-per-gpu), or set data.workers={max(1, int(shares[rank] + 1e-6))}; "
        "docs/performance.md has what a loader feeds"
    )
