"""Whom the ranks wait for. When a rank dies or hangs, the others end within a stated time and say which one it was.

Each rank's thread keeps a line about it in the store by which the ranks met: a beat that shows that its process lives,
the step it is at, what it does there, and how often it has got on. Rank 0's thread reads all lines, the others read
what rank 0 makes of them. Nothing here rests on an error of the backend: a collective of NCCL may block for ever. The
lines cost nothing in the step itself.
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
"""Seconds between two beats."""
SILENT = 20.0
"""Seconds without a beat after which a rank counts as gone. DeepSpeed's launcher kills the ranks of a node 31 s after
one of them died: by then the others have said who it was."""
SLOW = 6
"""Times `patience`: what a part of the work may take that does not say how it gets on, such as saving."""
GRACE = 20.0
"""Seconds that the end itself may take."""
ANSWER = 5.0
"""Seconds that the store may take for an answer."""
GONE = 1
"""Exit status of a rank that has given up."""
VERDICT = "verdict"
"""The store's entry for what rank 0 has found."""


@dataclass(frozen=True)
class Line:
    """What a rank says of itself."""

    beat: int
    step: int
    doing: str
    moves: int
    """How often it has got on."""
    allowed: float
    """Seconds that what it does may take."""


class Judge:
    """Looks at all ranks' lines, once a beat, and finds the rank that the others wait for in vain.

    It counts its own looks and not the clock, so that a job that was suspended as a whole goes on.
    """

    def __init__(self, rank: int, silent: float) -> None:
        self.rank, self.silent = rank, silent
        self._before: dict[int, Line] = {}
        self._without_beat: dict[int, int] = {}
        self._without_move = 0

    def look(self, lines: dict[int, Line]) -> str | None:
        """What is wrong, if anything is."""
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


class Watch:
    """While it is entered, this rank is watched and watches the others.

    Args:
        patience: seconds in which some rank has to get on: with a step, a batch of an evaluation, a video's features.
        at_end: called before this process ends itself, such as to close the run's record.
    """

    def __init__(self, ranks: Ranks, patience: float, at_end: Callable[[], None] = lambda: None) -> None:
        self.ranks, self.patience, self.at_end = ranks, patience, at_end
        self.silent = max(2 * BEAT, min(SILENT, patience))
        self._step, self._doing, self._moves, self._allowed = 0, "starting", 0, SLOW * patience
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="watch", daemon=True)
        self._store: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
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
                self._explain(error)  # while the beats go on: the others look too
            if kind is None:
                self.slow("at the end of the run")
                self.ranks.barrier()  # rank 0 may still be writing what was found, and would miss the others' beats
        finally:
            self._over.set()
            self._thread.join(GRACE)

    def step(self, step: int, doing: str) -> None:
        """What the main thread does from now on, for no longer than `patience` seconds."""
        self._step, self._doing, self._allowed = step, doing, self.patience
        self._moves += 1

    def slow(self, doing: str) -> None:
        """Something between steps that may take longer."""
        self._doing, self._allowed = doing, SLOW * self.patience
        self._moves += 1

    def progress(self) -> None:
        """A part of it is done."""
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
            except Exception:  # rank 0 has gone, or is slow
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
            time.sleep(2 * BEAT)  # rank 0 holds the store: the others have to read it first
        return verdict

    def _give_up(self, verdict: str) -> None:
        closing = threading.Thread(target=self.at_end, daemon=True)
        closing.start()
        # one line where all share a terminal, and one a node where rank 0 cannot say it
        if self.ranks.first or (verdict.startswith("rank 0") and self._speaks_for_its_node()):
            print(f"\nerror: rank {self.ranks.rank}: {verdict}; this rank ends", file=sys.stderr, flush=True)
        closing.join(GRACE)
        os._exit(GONE)  # the main thread waits within a collective, and cannot be woken

    def _speaks_for_its_node(self) -> bool:
        return self.ranks.rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _explain(self, error: BaseException) -> None:
        """A collective that failed: because of a rank that has gone, perhaps (gloo says so at once)."""
        try:
            before = self._read()
            time.sleep(2 * BEAT)
            after = self._read()
            gone: dict[int, Line | None] = {
                rank: line for rank, line in after.items() if line.beat == before[rank].beat
            }
            time.sleep(BEAT)  # until the others have looked
        except Exception:
            gone = {0: None}  # who held the store
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
        """The store's answer; its own time-out does not end a wait for a holder that hangs.

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
        with self._lock, suppress(RuntimeError):  # a holder that has gone
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
