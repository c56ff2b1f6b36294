"""The one exception that users are meant to see.

Entry points print its message as a single line and exit with 2; every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can fix. The message says what is wrong and how to fix it, in one line."""


class OneRankError(UserError):
    """An error of one rank only: that rank prints it, whereas rank 0 prints all other errors."""


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Prefixes the message of a `UserError` raised within by a name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def one_line(error: BaseException) -> str:
    """An error's message in one line: line breaks and unprintable characters are escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]
