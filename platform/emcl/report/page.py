"""Runs beside each other and beside the published figures: `report.html` and `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from emcl.config import to_yaml
from emcl.report.examples import cases
from emcl.report.plots import retrieval_plots
from emcl.report.published import PUBLISHED
from emcl.report.result import COLUMNS, OPTION_COLUMNS, Result, open_results, short


@dataclass(frozen=True)
class Line:
    """Of a table: a run, or what a paper says."""

    name: str
    ours: bool
    note: str
    cells: list[tuple[str, str]]
    """Value and interval, as text; empty where there is none."""


@dataclass(frozen=True)
class Table:
    """All runs of one task on one benchmark."""

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
    tables = tables_of(results)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(as_markdown(table) for table in tables) + "\n"
    (out / "report.md").write_text(text)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emcl.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {
            "result": result,
            "plots": retrieval_plots(result) if result.task == "retrieval" else [],
            "cases": cases(result),
            "config": to_yaml(result.config, secrets=False),
        }
        for result in results
    ]
    page = out / "report.html"
    page.write_text(
        environment.get_template("page.html").render(tables=tables, sections=sections, option_columns=OPTION_COLUMNS),
        "utf-8",
    )
    return page, text


def tables_of(results: Sequence[Result]) -> list[Table]:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.benchmark, result.split, result.task), []).append(result)
    return [_table(key, found) for key, found in groups.items()]


def _table(key: tuple[str, str, str], results: list[Result]) -> Table:
    benchmark, split, task = key
    columns = COLUMNS.get(task) or list(dict.fromkeys(name for result in results for name in result.metrics))
    marked = [name for result in results for name in result.metrics if name.endswith("_tokens")]
    columns = columns + list(dict.fromkeys(marked))  # scores of another tokenizer have columns of their own
    lines = []
    for result in results:
        cells = [_cell(result, name) for name in columns]
        note = f"NOT COMPARABLE with published figures: {result.incomplete}" if result.incomplete else ""
        lines.append(Line(result.name, True, note, cells))
        dual = [name for name in result.metrics if "_dsl_transductive/" in name]
        if dual:
            found = [result.metrics.get(name.replace("/", "_dsl_transductive/")) for name in columns]
            dual_cells = [("" if value is None else f"{value:.1f}", "") for value in found]
            lines.append(Line(f"{result.name} + DSL", True, "transductive", dual_cells))
    for paper in PUBLISHED.get(key, []):
        note = paper.source + (", transductive" if paper.transductive else "")
        values = [f"{paper.metrics[name]:.1f}" if name in paper.metrics else "" for name in columns]
        lines.append(Line(paper.model, False, note, [(value, "") for value in values]))
    title = " ".join(part for part in (benchmark or "unnamed set", split, task.replace("_", " ")) if part)
    protocols = [
        f"{result.name}: {result.protocol}; seed {result.seed}; commit {result.commit[:12]}; "
        "intervals: 95% by bootstrap over videos, of one training"
        for result in results
    ]
    return Table(title, [short(name) for name in columns], lines, protocols)


def _cell(result: Result, name: str) -> tuple[str, str]:
    if name not in result.metrics:
        return "", ""
    low_high = result.intervals.get(name)
    return f"{result.metrics[name]:.1f}", f"{low_high[0]:.1f} to {low_high[1]:.1f}" if low_high else ""


def as_markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", f"| | {' | '.join(table.columns)} | |", "|" + "---|" * (len(table.columns) + 2)]
    for line in table.lines:
        cells = [f"{value} ({spread})" if spread else value for value, spread in line.cells]
        name = line.name if line.ours else f"*{line.name}*"
        lines.append(f"| {_plain(name)} | {' | '.join(cells)} | {_plain(line.note)} |")
    return "\n".join([*lines, "", *(f"- {_plain(protocol)}" for protocol in table.protocols)])


def _plain(text: str) -> str:
    """Nothing in it ends a cell."""
    return text.replace("|", "\\|").replace("\n", " ")
