"""Starts loader processes, checks that they run, and ends them reliably.

A forked process inherits every lock in its current state. A lock held by another thread of the parent (gloo's, NCCL's,
the watchdog's) is never released in the child, which then hangs before its first line. SIGTERM does not end it there,
because the handler that asks a run to save is still installed. On a busy machine, two starts in a thousand hung like
this; which lock it was is not known.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import RawArray
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from emcl.errors import OneRankError

BIRTH = 60.0
"""Seconds within which a process must report that it runs; usually it takes some hundredths."""
STARTS = 3
"""How often all processes of a loader are started before it is an error."""
_LOOK = 0.01


class Lives:
    """Which workers are running: each sets its flag first, in memory shared with its parent."""

    def __init__(self, workers: int) -> None:
        self._lives = RawArray("b", workers)

    def __call__(self, worker: int) -> None:
        self._lives[worker] = 1

    def __contains__(self, worker: int) -> bool:
        return bool(self._lives[worker])

    def forget(self) -> None:
        self._lives[:] = [0] * len(self._lives)


def start_workers(loader: DataLoader[Any], rank: int) -> Iterator[Any]:
    """The batches of a rank's loader whose `worker_init_fn` is a `Lives`; restarts all processes if some hang.

    PyTorch's SIGCHLD handler raises for a dead worker wherever the main thread is, even in the middle of a step. So it
    is removed; a dead worker is then detected when the next batch is requested.

    Raises:
        OneRankError: they hang STARTS times.
    """
    if not loader.num_workers:
        return iter(loader)
    lives = loader.worker_init_fn
    assert isinstance(lives, Lives)
    for _ in range(STARTS):
        lives.forget()
        iterator = _without_handler(loader)
        if not (stuck := _stuck(_processes(iterator), lives)):
            return iterator
        _kill(stuck)
        del iterator
        tqdm.write(
            f"rank {rank}: {len(stuck)} of {loader.num_workers} loader processes hung at their start; all start again"
        )
    raise OneRankError(
        f"loader processes of rank {rank} gave no sign of life within {BIRTH:.0f} s, {STARTS} times; "
        "data.workers=0 loads without them"
    )


def end_workers(iterator: Iterator[Any]) -> None:
    """Kills all workers; SIGTERM does not end those blocked on a file server, and this process would wait for them."""
    _kill(_processes(iterator))


def _processes(iterator: Any) -> list[BaseProcess]:
    return list(iterator._workers)  # PyTorch has no public attribute for them


def _stuck(workers: list[BaseProcess], lives: Lives) -> list[BaseProcess]:
    """Counts checks instead of seconds, so that a suspended and resumed job does not time out."""
    for _ in range(max(1, round(BIRTH / _LOOK))):
        late = [one for number, one in enumerate(workers) if number not in lives and one.is_alive()]
        if not late:
            break
        time.sleep(_LOOK)
    return late


def _kill(workers: list[BaseProcess]) -> None:
    for one in workers:
        one.kill()
    for one in workers:
        one.join(5)  # one blocked in the kernel may stay longer


def _without_handler(loader: DataLoader[Any]) -> Iterator[Any]:
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    of_torch = getattr(before, "__module__", "").startswith("torch.")  # set by a loader started elsewhere
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or before is None else before)
    return iterator
