"""The allowed fraction of bad samples in a split; with more of them a run stops and lists them."""

from __future__ import annotations

from collections.abc import Sequence

from emcl.errors import UserError

LISTED = 5


def check_bad_fraction(
    bad: Sequence[str], total: int, allowed: float, what: str, *, count: int | None = None, where: str = ""
) -> None:
    """Raises a UserError if more than the fraction `allowed` of `total` samples is bad.

    Args:
        bad: one line per bad sample.
        what: what is wrong with them, printed after the numbers.
        count: number of bad samples, if a line stands for more than one.
        where: text appended to the message that says where the full list is.
    """
    count = len(bad) if count is None else count
    if count > allowed * total:
        more = f" (and {len(bad) - LISTED} more)" if len(bad) > LISTED else ""
        listed = "; ".join(bad[:LISTED])
        raise UserError(
            f"{count} of {total} {what}, more than data.max_bad_fraction={allowed} allows: {listed}{more}{where}"
        )
