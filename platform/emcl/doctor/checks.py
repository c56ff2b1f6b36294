"""A check's outcome; running, showing and saving all checks."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emcl.errors import first_line

Checks = Callable[[], Iterator["Check"]]
"""A group of checks: yields each outcome as it is known."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    figure: str
    """The measured value, with its unit."""
    wanted: str = ""
    passed: bool | None = None
    """None if there is no criterion: a measurement, or what this machine cannot check."""
    detail: str = ""
    """A traceback, lines of code: for the JSON."""

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: ""}[self.passed]


def run_groups(
    groups: Mapping[str, Checks],
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[Mapping[str, list[Check]]], None] = lambda _: None,
) -> dict[str, list[Check]]:
    """Each group's outcomes. A group that raises has failed, and the next one runs; after `seconds` none starts.

    Args:
        say: called with a line for each outcome.
        keep: called with all outcomes after each, so that they are kept if the process is killed.
    """
    until = time.monotonic() + seconds
    outcomes: dict[str, list[Check]] = {}
    for group, checks in groups.items():
        began = time.monotonic()
        done = outcomes.setdefault(group, [])
        if began > until:
            done.append(Check("not run", f"the {seconds / 60:.0f} minutes are over (--minutes)"))
            continue
        try:
            for check in checks():
                done.append(check)
                say(f"  {check.name}: {check.figure} {check.verdict}")
                keep(outcomes)
                if time.monotonic() > until:
                    done.append(Check("the rest", f"not run: the {seconds / 60:.0f} minutes are over (--minutes)"))
                    break
        except Exception as error:  # any error: the user sends us the report
            done.append(Check("stopped", first_line(error)[:200], passed=False, detail=traceback.format_exc()))
            say(f"  stopped: {first_line(error)[:200]}")
        say(f"{group}: {time.monotonic() - began:.0f} s")
    return outcomes


def table(outcomes: Mapping[str, list[Check]]) -> str:
    """As Markdown, for docs/performance.md."""
    lines = ["| | check | found | wanted | |", "|---|---|---|---|---|"]
    for group, checks in outcomes.items():
        for number, check in enumerate(checks):
            name = group if number == 0 else ""
            lines.append(f"| {name} | {check.name} | {check.figure} | {check.wanted} | {check.verdict} |")
    return "\n".join(lines)


def write_json(path: Path, machine: Mapping[str, Any], outcomes: Mapping[str, list[Check]]) -> None:
    """Writes the file for a bug report."""
    content = {
        "machine": dict(machine),
        "checks": {group: [asdict(one) for one in checks] for group, checks in outcomes.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
