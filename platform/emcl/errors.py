"""The one exception that users are meant to see.

Entry points print its message as a single line and exit with 2; every other exception is our own
mistake and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. The message names the thing and the way out, in one line."""


class OneRankError(UserError):
    """What one rank alone has found: that rank says it, where others leave it to the first."""


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Puts a name before what a `UserError` within says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line: line breaks and what else is not printed stand as escapes."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(error))


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its kind, where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
