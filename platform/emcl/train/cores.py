"""Whether each rank has as many cores as it starts loader processes: with fewer, a GPU waits, and nothing says why."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence

Place = tuple[str, list[int]]
"""A machine's name, and the cores of it that a process may run on."""


def place() -> Place:
    """This process's. Schedulers and launchers bind processes to cores; a container's quota of time is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return socket.gethostname(), sorted(os.sched_getaffinity(0))
    return socket.gethostname(), list(range(os.cpu_count() or 1))


def too_few_cores(places: Sequence[Place], workers: int) -> str | None:
    """A line on the rank with the fewest cores, if they are fewer than its loaders; `places` are those of all ranks.

    Ranks that may run on the same core have a part of it each.
    """
    users = Counter((host, core) for host, cores in places for core in cores)
    shares = [sum(1 / users[host, core] for core in cores) for host, cores in places]
    rank = min(range(len(shares)), key=shares.__getitem__)
    if shares[rank] >= workers - 1e-6:
        return None
    host, cores = places[rank]
    shared = max(users[host, core] for core in cores)
    of = f", which {shared} ranks share" if shared > 1 else ""
    return (
        f"rank {rank} on {host} has {len(cores)} core(s){of}, and data.workers={workers} loaders: ask the scheduler "
        f"for more (--cpus-per-gpu), or set data.workers={max(1, int(shares[rank] + 1e-6))}; "
        "docs/performance.md has what a loader feeds"
    )
