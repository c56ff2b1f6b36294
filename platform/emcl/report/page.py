"""Compares runs with each other and with published figures: `report.html` and `report.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from emcl.config import to_yaml
from emcl.registry import task_class
from emcl.report.sample_frames import pictures
from emcl.task import Result, TaskReport
from emcl.task.task_result import open_results


@dataclass(frozen=True)
class Line:
    """A line of a table: a run, or a paper's result."""

    name: str
    ours: bool
    note: str
    cells: list[tuple[str, str]]
    """Value and interval, as text; empty where there is none."""


@dataclass(frozen=True)
class Comparison:
    """All runs of one kind of task on one benchmark."""

    title: str
    columns: list[str]
    lines: list[Line]
    protocols: list[str]


def write_report(runs: Sequence[Path], out: Path) -> tuple[Path, str]:
    """Writes both files to `out`; returns the page's path and the Markdown.

    Raises:
        UserError: a run without test scores.
    """
    results = [result for run in runs for result in open_results(run)]
    comparisons = compare(results)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(as_markdown(comparison) for comparison in comparisons) + "\n"
    (out / "report.md").write_text(text)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emcl.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [_section(result) for result in results]
    page = out / "report.html"
    page.write_text(environment.get_template("page.html").render(comparisons=comparisons, sections=sections), "utf-8")
    return page, text


def _section(result: Result) -> dict[str, Any]:
    """What the page shows of one result below the tables."""
    report = report_of(result)
    return {
        "result": result,
        "title": _words(result.task),
        "plots": report.plots(result),
        "tables": report.tables(result),
        "cases": report.cases(result, pictures(result)),
        "config": to_yaml(result.config, secrets=False),
    }


def report_of(result: Result) -> TaskReport:
    """The report of the result's task."""
    report: TaskReport = task_class(result.kind).report
    return report


def compare(results: Sequence[Result]) -> list[Comparison]:
    """A table for each benchmark, protocol and kind of task."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.benchmark, result.split, result.kind), []).append(result)
    return [_comparison(*key, group) for key, group in groups.items()]


def _comparison(benchmark: str, split: str, kind: str, results: list[Result]) -> Comparison:
    report = report_of(results[0])
    columns = report.columns_of(list(dict.fromkeys(name for result in results for name in result.metrics)))
    lines = []
    for result in results:
        bounds = report.intervals(result)
        note = f"NOT COMPARABLE with published figures: {result.incomplete}" if result.incomplete else ""
        lines.append(Line(result.name, True, note, [_cell(result.metrics, name, bounds) for name in columns]))
        lines += [
            Line(f"{result.name}, {one.name}", True, one.note, [_cell(one.metrics, name) for name in columns])
            for one in report.variants(result)
        ]
    for paper in report.published.get((benchmark, split), ()):
        note = paper.source + (", transductive" if paper.transductive else "")
        lines.append(Line(paper.model, False, note, [_cell(paper.metrics, name) for name in columns]))
    title = " ".join(word for word in (benchmark or "unnamed set", split, _words(kind)) if word)
    protocols = [
        f"{result.name}: {result.protocol}; {f'{result.chosen}; ' if result.chosen else ''}seed {result.seed}; "
        f"commit {result.commit[:12]}; intervals: 95% by bootstrap over videos, of one training"
        for result in results
    ]
    return Comparison(title, [report.short(name) for name in columns], lines, protocols)


def _cell(
    metrics: Mapping[str, float], name: str, bounds: Mapping[str, tuple[float, float]] = MappingProxyType({})
) -> tuple[str, str]:
    if name not in metrics:
        return "", ""
    low_high = bounds.get(name)
    return f"{metrics[name]:.1f}", f"{low_high[0]:.1f} to {low_high[1]:.1f}" if low_high else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def as_markdown(comparison: Comparison) -> str:
    """A heading, the table, a line for each protocol."""
    head = f"| | {' | '.join(comparison.columns)} | |"
    lines = [f"## {comparison.title}", "", head, "|" + "---|" * (len(comparison.columns) + 2)]
    for line in comparison.lines:
        cells = [f"{value} ({spread})" if spread else value for value, spread in line.cells]
        name = line.name if line.ours else f"*{line.name}*"
        lines.append(f"| {_plain(name)} | {' | '.join(cells)} | {_plain(line.note)} |")
    return "\n".join([*lines, "", *(f"- {_plain(protocol)}" for protocol in comparison.protocols)])


def _plain(text: str) -> str:
    """Escapes text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
