"""Detects ranks that die or hang: the other ranks then exit within a stated time and report which rank it was.

A thread of each rank writes a status line to the rendezvous store: a heartbeat, the current step and activity, and a
progress counter. Rank 0's thread reads all lines, the others read its verdict. Nothing here relies on errors of the
backend: an NCCL collective may block forever. The lines cost nothing in the step itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from emcl.distributed import Ranks
from emcl.errors import OneRankError, first_line

BEAT = 2.0
"""Seconds between two heartbeats."""
SILENT = 20.0
"""Seconds without a heartbeat after which a rank counts as dead. DeepSpeed's launcher kills the ranks of a node 31 s
after one of them died: by then the others have reported it."""
SLOW = 6
"""Factor on `patience` for work that reports no progress, such as saving."""
GRACE = 20.0
"""Seconds that shutting down may take."""
ANSWER = 5.0
"""Seconds that an answer of the store may take."""
GONE = 1
"""Exit status of a rank that has given up."""
VERDICT = "verdict"
"""The store's key of rank 0's verdict."""


@dataclass(frozen=True)
class Line:
    """A rank's status."""

    beat: int
    step: int
    doing: str
    moves: int
    """Progress counter."""
    allowed: float
    """Seconds that its current activity may take."""


class Judge:
    """Checks all ranks' lines once a heartbeat and finds a rank that is dead or stuck.

    It counts checks and not seconds, so that a job that was suspended as a whole continues.
    """

    def __init__(self, rank: int, silent: float) -> None:
        self.rank, self.silent = rank, silent
        self._before: dict[int, Line] = {}
        self._without_beat: dict[int, int] = {}
        self._without_move = 0

    def look(self, lines: dict[int, Line]) -> str | None:
        """Describes the problem, if there is one."""
        before, self._before = self._before, lines
        if not before:
            return None
        for rank, line in lines.items():
            silent = line.beat == before[rank].beat and rank != self.rank
            self._without_beat[rank] = self._without_beat.get(rank, 0) + 1 if silent else 0
        moved = any(line.moves != before[rank].moves for rank, line in lines.items())
        self._without_move = 0 if moved else self._without_move + 1
        gone = {rank: lines[rank] for rank, looks in self._without_beat.items() if looks * BEAT >= self.silent}
        if gone:
            return f"{_named(gone)} has given no sign of life for {self.silent:.0f} s: it has ended or hangs"
        allowed = max(line.allowed for line in lines.values())
        if self._without_move * BEAT > allowed:
            return f"nothing was finished within {allowed:.0f} s (patience): {_waited_for(lines)}"
        return None


class Watchdog:
    """Context manager: within it, this rank is watched and watches the others.

    Args:
        patience: seconds within which some rank must make progress: a step, a batch of an evaluation, a video's
            features.
        at_end: called before this process exits by itself, such as to close the run's record.
    """

    def __init__(self, ranks: Ranks, patience: float, at_end: Callable[[], None] = lambda: None) -> None:
        self.ranks, self.patience, self.at_end = ranks, patience, at_end
        self.silent = max(2 * BEAT, min(SILENT, patience))
        self._step, self._doing, self._moves, self._allowed = 0, "starting", 0, SLOW * patience
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="watchdog", daemon=True)
        self._store: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Watchdog:
        if self.ranks.world_size == 1:
            return self
        self._store = self.ranks.open_store(timedelta(seconds=GRACE))
        if self.ranks.first:
            self._ask(lambda: self._store.set(VERDICT, ""))
        self._write(0)
        self.ranks.barrier()  # every rank has a line from here on
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._store is None:
            return
        try:
            if isinstance(error, RuntimeError):
                self._explain(error)  # while the heartbeats go on: the others check too
            if kind is None:
                self.slow("at the end of the run")
                self.ranks.barrier()  # rank 0 may still be writing results, and would miss the others' heartbeats
        finally:
            self._over.set()
            self._thread.join(GRACE)

    def step(self, step: int, doing: str) -> None:
        """Sets what the main thread does from now on, for at most `patience` seconds."""
        self._step, self._doing, self._allowed = step, doing, self.patience
        self._moves += 1

    def slow(self, doing: str) -> None:
        """Sets an activity between steps, which may take longer."""
        self._doing, self._allowed = doing, SLOW * self.patience
        self._moves += 1

    def progress(self) -> None:
        """Reports progress of the current activity."""
        self._moves += 1

    def _live(self) -> None:
        beat, unanswered = 0, 0
        judge = Judge(self.ranks.rank, self.silent)
        while not self._over.wait(BEAT):
            beat += 1
            try:
                self._write(beat)
                verdict = self._judged(judge)
                unanswered = 0
            except Exception:  # rank 0 is dead, or slow
                unanswered += 1
                late = unanswered * BEAT >= self.silent
                verdict = "rank 0, which keeps the ranks' record, does not answer" if late else None
            if verdict and not self._over.is_set():
                self._give_up(verdict)

    def _judged(self, judge: Judge) -> str | None:
        if not self.ranks.first:
            return self._ask(lambda: self._store.get(VERDICT)).decode() or None
        verdict = judge.look(self._read())
        if verdict:
            self._ask(lambda: self._store.set(VERDICT, verdict))
            time.sleep(2 * BEAT)  # rank 0 hosts the store: the others have to read it first
        return verdict

    def _give_up(self, verdict: str) -> None:
        closing = threading.Thread(target=self.at_end, daemon=True)
        closing.start()
        # rank 0 prints for all; if rank 0 itself is dead, one rank a node does
        if self.ranks.first or (verdict.startswith("rank 0") and self._speaks_for_its_node()):
            print(f"\nerror: rank {self.ranks.rank}: {verdict}; this rank ends", file=sys.stderr, flush=True)
        closing.join(GRACE)
        os._exit(GONE)  # the main thread is blocked in a collective

    def _speaks_for_its_node(self) -> bool:
        return self.ranks.rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _explain(self, error: BaseException) -> None:
        """Raises an error that names the dead ranks, if a collective failed because of any (gloo fails at once)."""
        try:
            before = self._read()
            time.sleep(2 * BEAT)
            after = self._read()
            gone: dict[int, Line | None] = {
                rank: line for rank, line in after.items() if line.beat == before[rank].beat
            }
            time.sleep(BEAT)  # until the others have checked
        except Exception:
            gone = {0: None}  # it hosted the store
        gone.pop(self.ranks.rank, None)
        if gone:
            raise OneRankError(f"{_named(gone)} has ended; this rank ends too ({first_line(error)[:200]})") from None

    def _write(self, beat: int) -> None:
        line = json.dumps(asdict(Line(beat, self._step, self._doing, self._moves, self._allowed)))
        self._ask(lambda: self._store.set(str(self.ranks.rank), line))

    def _read(self) -> dict[int, Line]:
        keys = [str(rank) for rank in range(self.ranks.world_size)]
        lines = self._ask(lambda: self._store.multi_get(keys))
        return {rank: Line(**json.loads(line)) for rank, line in enumerate(lines)}

    def _ask(self, call: Callable[[], Any]) -> Any:
        """The store's answer; the store's own time-out does not apply if its host hangs.

        Raises:
            TimeoutError: none came.
        """
        answers: list[Any] = []
        asking = threading.Thread(target=self._take_turns, args=(call, answers), daemon=True)
        asking.start()
        asking.join(ANSWER)
        if not answers:
            raise TimeoutError
        return answers[0]

    def _take_turns(self, call: Callable[[], Any], answers: list[Any]) -> None:
        with self._lock, suppress(RuntimeError):  # the host is dead
            answers.append(call())


def _waited_for(lines: dict[int, Line]) -> str:
    behind = min(line.step for line in lines.values())
    late = {rank: line for rank, line in lines.items() if line.step == behind}
    if len(late) < len(lines):
        return f"the others wait for {_named(late)}"
    busy = {rank: line for rank, line in lines.items() if line.doing != "training"}
    if busy and len(busy) < len(lines):
        return f"the others wait for {_named(busy)}"
    return f"all ranks are within step {behind} ({lines[0].doing})"


def _named(ranks: Mapping[int, Line | None]) -> str:
    shown = [
        f"rank {rank}" + (f" ({line.doing} at step {line.step})" if line else "")
        for rank, line in sorted(ranks.items())[:8]
    ]
    return ", ".join(shown) + (f" and {len(ranks) - 8} others" if len(ranks) > 8 else "")
