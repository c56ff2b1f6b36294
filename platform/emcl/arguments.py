"""What the commands' argument parsers share: numbers with a range, `--out`, and help on settings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from emcl.disk import why_not_written
from emcl.errors import UserError, one_line
from emcl.settings import wanted

SETTING = re.compile(r"[a-z_][\w.]*=")
"""How `key=value` begins."""


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, like all errors for users."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(ValueError(message))} (see {self.prog} --help)\n")


def task_names(text: str) -> list[str]:
    """`--task`, an option's `type=`: names joined by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no task is named (`emcl tasks` lists them)")
    return names


def whole(**bounds: Any) -> Callable[[str], int]:
    """An option's `type=`, such as `whole(ge=1)`; the bounds are those of a setting's `Field`."""
    return _reader(Annotated[int, Field(**bounds)])


def number(**bounds: Any) -> Callable[[str], float]:
    """As `whole`, for finite numbers."""
    return _reader(Annotated[float, Field(allow_inf_nan=False, **bounds)])


def _reader(annotation: Any) -> Callable[[str], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted(annotation)}") from None

    return read


def check_out(path: Path, *, folder: bool, option: str = "--out") -> None:
    """Checks that results can be written, before the work starts; creates nothing.

    Raises:
        UserError: something else has the name, or the location is read-only.
    """
    why = why_not_written(path)
    if os.path.lexists(path) and os.path.isdir(path) != folder:  # noqa: PTH112, which raises
        why = "a file, not a folder" if folder else "a folder, not a file"
    if why:
        raise UserError(f"{option} {path}: {why}")


class Help(argparse.Action):
    """`--help`, and `--help GROUP` or `--help KEY` for the settings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from emcl.config_docs import explain, overview

        try:
            print(explain(str(values)) if values else f"{parser.format_help()}\n{overview()}")
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def add_help(parser: argparse.ArgumentParser) -> None:
    """Adds it to a parser made with `add_help=False`."""
    parser.add_argument(
        "-h", "--help", nargs="?", metavar="GROUP", action=Help, help="this, or what settings there are"
    )
