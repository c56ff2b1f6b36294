"""Deviations from the published protocol as tables: of all shipped recipes in Markdown, of a run's settings as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from emcl.config import Config, resolve
from emcl.errors import UserError, first_line
from emcl.published_protocol import (
    BuiltIn,
    Deviation,
    Form,
    Record,
    deviations,
    record_of,
    records,
    shipped_forms,
    unrecorded,
)

BEGIN, END = "<!-- emcl config --deviations -->", "<!-- end -->"
"""Around the tables in a page."""
UNLISTED = "(not listed)"
Row = tuple[str, ...]


def page() -> str:
    """The deviations of all shipped recipes, with their reasons, and what is not known of the published code."""
    known = records()
    return "\n".join([*_settings(known), *_facts(known), *_unknown(known)])


def write_into(path: Path) -> None:
    """Puts `page` into a Markdown file, between its marks.

    Raises:
        UserError: it has no such marks.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--deviations {path}: {first_line(error)}") from None
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise UserError(f"{path} has no lines {BEGIN} and {END}, between which the tables go")
    written = f"{before}{BEGIN}\n{page()}\n{END}{after}"
    try:
        path.write_text(written)
    except OSError as error:
        raise UserError(f"--deviations {path}: {first_line(error)}") from None


def against(config: Config, name: str, form: Form) -> str:
    """What of a run's settings is not as published for a benchmark, for a terminal.

    Args:
        form: which shipped recipe's reasons are given, where it has the same value.

    Raises:
        UserError: there is no record of that name.
    """
    record = record_of(name)
    found = deviations(config, record, form)
    known = {one.key for one in found}
    found += [Deviation(key, "-", "-", None) for key in unrecorded(config, record) if key not in known]
    as_published = len(record.facts) - sum(one.key in record.facts for one in found)
    head = f"{record.benchmark}: {as_published} of {len(record.facts)} settings are as published"
    rows = [("setting", "published", "here", "why our recipe has it so"), *map(_row, found)]
    rest = [f"  {what}: {fact.published}" for what, fact in record.built_in.items() if not fact.same or fact.ours]
    more = ["not compared, since no setting says it (docs/recipes.md); as published:", *rest]
    return "\n".join([head, *(_aligned(rows) if found else ()), *more])


def _row(one: Deviation) -> Row:
    return one.key, one.published, one.here, one.because or UNLISTED


def _aligned(rows: Sequence[Row]) -> Iterable[str]:
    widths = [min(40, max(len(row[column]) for row in rows)) for column in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])


def _settings(known: Sequence[Record]) -> Iterable[str]:
    """A line on the published recipes, and the table of ours."""
    found: dict[Form, dict[Row, list[str]]] = {"published_recipe": {}, "ours": {}}
    compared: dict[Form, list[str]] = {"published_recipe": [], "ours": []}
    for record in known:
        for form, name in shipped_forms(record):
            compared[form].append(record.recipe)
            config = resolve(None, name)
            for one in deviations(config, record, form):
                row = tuple(cell.replace(f"{config.data.root}/", "${data.root}/") for cell in _row(one))
                found[form].setdefault(row, []).append(record.recipe)
    numbers = sorted({len(record.facts) for record in known})
    yield (
        f"Settings that can change a figure: {numbers[0]} to {numbers[-1]} a benchmark. Recipes of "
        f"`recipe/published/` in which one differs from the code's: {_names(found['published_recipe'])}.\n"
    )
    if found["published_recipe"]:
        head = ("setting", "as published", "in the recipe", "why")
        yield from _table(head, found["published_recipe"], compared["published_recipe"])
    yield from _table(("setting", "as published", "ours", "why"), found["ours"], compared["ours"])


def _names(found: Mapping[Row, Sequence[str]]) -> str:
    return ", ".join(sorted({name for names in found.values() for name in names})) or "none"


def _table(head: Row, found: Mapping[Row, Sequence[str]], compared: Sequence[str]) -> Iterable[str]:
    yield f"| {' | '.join(head)} | recipes |"
    yield "|---" * (len(head) + 1) + "|"
    for (key, published, here, because), names in sorted(found.items()):
        yield f"| `{key}` | `{published}` | `{here}` | {because} | {_where(names, compared)} |"
    yield ""


def _facts(known: Sequence[Record]) -> Iterable[str]:
    """Deviations that no setting stands for."""
    yield "Deviations that no setting stands for:\n"
    yield "| | as published | here | why | recipes | benchmarks |"
    yield "|---" * 6 + "|"
    for (name, fact), where in _of_all(known, lambda fact: bool(fact.because)):
        yield f"| {name} | {fact.published} | {fact.here} | {fact.because} | published and ours | {where} |"
    for (name, fact), where in _of_all(known, lambda fact: fact.ours is not None):
        assert fact.ours is not None
        yield f"| {name} | {fact.published} | {fact.ours.value} | {fact.ours.because} | ours | {where} |"
    yield ""


def _of_all(known: Sequence[Record], wanted: Callable[[BuiltIn], bool]) -> list[tuple[tuple[str, BuiltIn], str]]:
    """The facts without a setting that are `wanted`, each once, with the benchmarks that they hold for."""
    found: dict[tuple[str, BuiltIn], list[str]] = {}
    for record in known:
        for name, fact in record.built_in.items():
            if wanted(fact):
                found.setdefault((name, fact), []).append(record.benchmark)
    every = [record.benchmark for record in known]
    return [(item, _where(benchmarks, every)) for item, benchmarks in found.items()]


def _where(names: Sequence[str], every: Sequence[str]) -> str:
    """Names, or which of all are left out."""
    others = [name for name in every if name not in names]
    if not others:
        return "all"
    return ", ".join(names) if len(names) <= len(every) / 2 else f"all but {', '.join(others)}"


def _unknown(known: Sequence[Record]) -> Iterable[str]:
    """What the record had to assume."""
    yield "What is not known of the published code:\n"
    yield "| | taken | not known | benchmarks |"
    yield "|---" * 4 + "|"
    rows: dict[Row, list[str]] = {}
    for record in known:
        for key, one in record.facts.items():
            if one.unknown:
                rows.setdefault((f"`{key}`", f"`{one.published}`", one.unknown), []).append(record.benchmark)
    for (name, fact), where in _of_all(known, lambda fact: bool(fact.unknown)):
        yield f"| {name} | {fact.here} | {fact.unknown} | {where} |"
    for row, benchmarks in rows.items():
        yield f"| {' | '.join(row)} | {_where(benchmarks, [record.benchmark for record in known])} |"
    yield ""
