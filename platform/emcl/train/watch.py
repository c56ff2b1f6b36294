"""Whom the ranks wait for. When a rank dies or hangs, the others end within a stated time and say which one it was.

Each rank's thread keeps a line about it in a store that rank 0 holds: a beat that shows that its process lives, the
step it is at, and what it does there. The line costs nothing in the step itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from emcl.distributed import Ranks
from emcl.errors import OneRankError, first_line

BEAT = 2.0
"""Seconds between two beats."""
SLOW = 6
"""Times `patience`: what a validation or a checkpoint may take."""
GRACE = 20.0
"""Seconds that the end itself may take."""
ANSWER = 5.0
"""Seconds that the store's holder may take."""
GONE = 1
"""Exit status of a rank that has given up."""


class Watch:
    """While it is entered, this rank is watched and watches the others.

    Args:
        patience: seconds that a step may take before this process ends.
        at_end: called before that, such as to close the run's record.
    """

    def __init__(self, ranks: Ranks, patience: float, at_end: Callable[[], None]) -> None:
        self.ranks, self.patience, self.at_end = ranks, patience, at_end
        self._place: tuple[int, str] = (0, "starting")
        self._until = float("inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="watch", daemon=True)
        self._store: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        if self.ranks.world_size == 1:
            return self
        store = self.ranks.open_store(timedelta(seconds=GRACE))
        if not all(self.ranks.gather_objects(store is not None)):  # a firewall between the nodes, perhaps
            if self.ranks.first:
                tqdm.write("ranks do not reach rank 0's store: a rank that hangs will not be named")
            return self
        self._store = store
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
        finally:
            self._over.set()
            self._thread.join(GRACE)

    def step(self, step: int, doing: str) -> None:
        """What the main thread does from now on, for no longer than `patience` seconds."""
        self._place, self._until = (step, doing), time.monotonic() + self.patience

    def slow(self, doing: str) -> None:
        """Something between steps that may take longer."""
        self._place, self._until = (self._place[0], doing), time.monotonic() + SLOW * self.patience

    def _live(self) -> None:
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            with suppress(Exception):  # rank 0 has gone, or is slow: that is found below
                self._write(beat)
            if time.monotonic() > self._until:
                self._give_up()

    def _give_up(self) -> None:
        reason = f"nothing was finished within patience={self.patience:.0f} s: {self._whom()}"
        closing = threading.Thread(target=self.at_end, daemon=True)
        closing.start()
        if self._first_to_say():
            print(f"\nerror: rank {self.ranks.rank}: {reason}", file=sys.stderr, flush=True)
        closing.join(GRACE)
        os._exit(GONE)  # the main thread waits within a collective, and cannot be woken

    def _explain(self, error: BaseException) -> None:
        """A collective that failed: because of a rank that has gone, perhaps."""
        try:
            before = self._read()
            time.sleep(2 * BEAT)
            gone = _without_beat(before, self._read())
            time.sleep(BEAT)  # until the others have looked
        except Exception:
            gone = {0: None}  # who held the store
        gone.pop(self.ranks.rank, None)
        if gone:
            raise OneRankError(f"{_named(gone)} has ended; this rank ends too ({first_line(error)[:200]})") from None

    def _whom(self) -> str:
        try:
            before = self._read()
            time.sleep(2 * BEAT)
            after = self._read()
        except Exception:
            return "rank 0, which keeps the ranks' record, does not answer"
        silent = _without_beat(before, after)
        silent.pop(self.ranks.rank, None)  # its beat rests while it looks
        if silent:
            return f"{_named(silent)} does not answer"
        places = {rank: (line["step"], line["doing"]) for rank, line in after.items()}
        behind = min(step for step, _ in places.values())
        late = {rank: after[rank] for rank, (step, _) in places.items() if step == behind}
        if len(late) < len(after):
            return f"the others wait for {_named(late)}"
        loading = {rank: after[rank] for rank, (_, doing) in places.items() if doing != "training"}
        if loading and len(loading) < len(after):
            return f"the others wait for {_named(loading)}"
        return f"all ranks are within step {behind}"

    def _write(self, beat: int) -> None:
        step, doing = self._place
        line = json.dumps({"beat": beat, "step": step, "doing": doing})
        self._ask(lambda: self._store.set(str(self.ranks.rank), line))

    def _read(self) -> dict[int, dict[str, Any]]:
        keys = [str(rank) for rank in range(self.ranks.world_size)]
        lines = self._ask(lambda: self._store.multi_get(keys))
        return {rank: json.loads(line) for rank, line in enumerate(lines)}

    def _first_to_say(self) -> bool:
        try:
            return self._ask(lambda: self._store.add("said", 1)) == 1
        except Exception:
            return True

    def _ask(self, call: Callable[[], Any]) -> Any:
        """The store's answer; its own time-out does not end a wait for a holder that hangs.

        Raises:
            TimeoutError: none came.
        """
        found: list[Any] = []
        asking = threading.Thread(target=self._take_turns, args=(call, found), daemon=True)
        asking.start()
        asking.join(ANSWER)
        if not found:
            raise TimeoutError
        return found[0]

    def _take_turns(self, call: Callable[[], Any], found: list[Any]) -> None:
        with self._lock, suppress(RuntimeError):  # a holder that has gone
            found.append(call())


def _without_beat(before: dict[int, Any], after: dict[int, Any]) -> dict[int, Any]:
    return {rank: line for rank, line in after.items() if line["beat"] == before[rank]["beat"]}


def _named(ranks: dict[int, Any]) -> str:
    return ", ".join(
        f"rank {rank}" + (f" ({line['doing']} at step {line['step']})" if line else "")
        for rank, line in sorted(ranks.items())
    )
