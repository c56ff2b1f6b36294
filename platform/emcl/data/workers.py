"""Loader processes: started, seen to live, and ended for certain.

A forked process has every lock as it was at that moment. One that another thread of its parent held (gloo's, NCCL's,
the watch's) is never let go in it: it hangs before its first line, where SIGTERM is still the run's polite request to
save, and does not end it. Two starts of a thousand hung there on a busy machine; which lock it was is not known.
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
"""Seconds in which a process has to say that it lives; it takes some hundredths."""
STARTS = 3
"""How often all of a loader's processes are started before that is an error."""
_LOOK = 0.01


class Lives:
    """Which workers have come to life: each one's first act, in memory that it shares with its parent."""

    def __init__(self, workers: int) -> None:
        self._lives = RawArray("b", workers)

    def __call__(self, worker: int) -> None:
        self._lives[worker] = 1

    def __contains__(self, worker: int) -> bool:
        return bool(self._lives[worker])

    def forget(self) -> None:
        self._lives[:] = [0] * len(self._lives)


def start_workers(loader: DataLoader[Any], rank: int) -> Iterator[Any]:
    """The batches of a rank's loader whose `worker_init_fn` is a `Lives`; processes of it that hang are replaced.

    PyTorch's handler of SIGCHLD raises for a dead worker wherever the main thread is, in the middle of a step if need
    be; without it the death is found when a batch is asked for.

    Raises:
        OneRankError: they hang again and again.
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
    """At once, also those that wait for a file server, which SIGTERM does not end and this process would wait for."""
    _kill(_processes(iterator))


def _processes(iterator: Any) -> list[BaseProcess]:
    return list(iterator._workers)  # PyTorch has no public name for them


def _stuck(workers: list[BaseProcess], lives: Lives) -> list[BaseProcess]:
    """Looks are counted, not the clock: a job that was suspended as a whole goes on."""
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
        one.join(5)  # one in the kernel may stay a while


def _without_handler(loader: DataLoader[Any]) -> Iterator[Any]:
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    of_torch = getattr(before, "__module__", "").startswith("torch.")  # of a loader that somebody else started
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if of_torch or before is None else before)
    return iterator
