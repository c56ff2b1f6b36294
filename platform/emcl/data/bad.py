"""What may be bad of a split: a stated fraction, with more of which a run stops and lists it."""

from __future__ import annotations

from collections.abc import Sequence

from emcl.errors import UserError

LISTED = 5


def check_bad_fraction(
    bad: Sequence[str], total: int, allowed: float, what: str, *, count: int | None = None, where: str = ""
) -> None:
    """Raises a UserError where more than `allowed` of `total` is bad.

    Args:
        bad: a line each.
        what: they are or do not, after the numbers.
        count: of samples, where a line stands for more than one.
        where: all of them can be found, if anywhere.
    """
    count = len(bad) if count is None else count
    if count > allowed * total:
        more = f" (and {len(bad) - LISTED} more)" if len(bad) > LISTED else ""
        listed = "; ".join(bad[:LISTED])
        raise UserError(
            f"{count} of {total} {what}, more than data.max_bad_fraction={allowed} allows: {listed}{more}{where}"
        )
