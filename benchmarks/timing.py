"""Shared measuring code: sides alternate, each repeat gives a figure, medians and spreads are compared."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Row:
    """One row of the table: our median and those of others from the same run."""

    item: str
    case: str
    unit: str
    ours: float
    others: dict[str, float]
    """Name -> median of what ours is compared with."""
    spread: float | None
    """(highest - lowest) / median of our repeats; None if measured once."""
    targets: dict[str, str] = field(default_factory=dict)
    """Targets for the ratio to one of `others`, such as `{"bare PyAV": ">= 0.95"}`."""
    note: str = ""

    def ratio(self, other: str) -> float:
        return self.ours / self.others[other]

    def met(self, other: str) -> bool | None:
        """Whether the target is met; None if there is none."""
        if other not in self.targets:
            return None
        sign, value = self.targets[other].split()
        return self.ratio(other) >= float(value) if sign == ">=" else self.ratio(other) <= float(value)


def spread(values: Sequence[float]) -> float | None:
    """(highest - lowest) / median, or None for a single value."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measures all sides in turn, `repeats` times; callers warm up caches before."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            figures[name].append(measure())
    return figures


def compared(
    item: str,
    case: str,
    unit: str,
    measured: Mapping[str, Sequence[float]],
    *,
    ours: str = "ours",
    targets: Mapping[str, str] | None = None,
    note: str = "",
) -> Row:
    """Makes a row from `alternate`'s figures."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    others = {name: value for name, value in medians.items() if name != ours}
    return Row(item, case, unit, medians[ours], others, spread(measured[ours]), dict(targets or {}), note)


def in_process(file: str, *arguments: object) -> dict[str, float]:
    """Runs `python FILE --one ARGUMENTS` in a separate process, so that its peak memory is measured alone."""
    command = [sys.executable, file, "--one", *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def seconds_and_memory(
    item: str,
    case: str,
    sides: Sequence[str],
    measure: Callable[[str], dict[str, float]],
    repeats: int,
    *,
    without_memory: str | None = None,
    note: str = "",
) -> list[Row]:
    """Two rows, of the `seconds` and `mib` that `measure` returns for each side; sides alternate."""
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}

    def turn(side: str) -> float:
        measured[side].append(measure(side))
        return measured[side][-1]["seconds"]

    seconds = alternate({side: partial(turn, side) for side in sides}, repeats)
    memory = {side: [one["mib"] for one in values] for side, values in measured.items() if side != without_memory}
    return [
        compared(item, case, "s", seconds, note=note),
        compared(item, f"{case}, memory", "MiB", memory, note=note),
    ]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per comparison of each row."""
    heads = ("", "", "ours", "spread", "beside", "theirs", "ours / theirs", "wanted", "")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        spread_shown = "measured once" if row.spread is None else f"{row.spread:.0%}"
        first = (row.item, row.case, f"{_short(row.ours)} {row.unit}", spread_shown)
        for number, (name, value) in enumerate(row.others.items() or [("", float("nan"))]):
            met = row.met(name)
            cells = (
                *(first if number == 0 else ("", "", "", "")),
                name,
                f"{_short(value)} {row.unit}" if name else "",
                f"{row.ratio(name):.2f}" if name else "",
                row.targets.get(name, ""),
                ("met" if met else "MISSED") if met is not None else row.note if number == 0 else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def script(description: str | None, measure: Callable[[int], list[Row]], name: str) -> None:
    """The main function of a benchmark: measures, prints the table, and saves the rows for `make bench`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = measure(options.repeats)
    print(table(rows))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
