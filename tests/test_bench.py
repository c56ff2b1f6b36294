"""The benchmarks' own arithmetic: medians, ratios, targets, and the table."""

from __future__ import annotations

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from timing import Row, alternate, compared, table


def test_sides_alternate_and_medians_are_compared() -> None:
    calls: list[str] = []

    def side(name: str, figures: list[float]) -> float:
        calls.append(name)
        return figures.pop(0)

    ours, theirs = [1.0, 3.0, 2.0], [10.0, 4.0, 5.0]
    timings = alternate({"ours": lambda: side("ours", ours), "theirs": lambda: side("theirs", theirs)}, 3)
    assert calls == ["ours", "theirs"] * 3
    row = compared("item", "case", "s", timings, targets={"theirs": "<= 0.5"})
    assert (row.ours, row.others["theirs"], row.spread, row.ratio("theirs")) == (2.0, 5.0, 1.0, 0.4)
    assert row.met("theirs") is True


def test_a_missed_target_is_called_missed() -> None:
    slow = Row("item", "case", "frames/s", 90.0, {"bare": 100.0, "other": 10.0}, 0.1, {"bare": ">= 0.95"})
    assert slow.met("bare") is False
    assert slow.met("other") is None
    first, second = table([slow]).splitlines()[2:]
    assert "MISSED" in first and "0.90" in first
    assert "MISSED" not in second and "9.00" in second


def test_what_was_measured_once_has_no_spread_and_says_so() -> None:
    row = compared("item", "case", "s", {"ours": [1.0], "theirs": [2.0]})
    assert row.spread is None
    assert "measured once" in table([row]) and "0%" not in table([row])
