"""Which shards a run wants, and whether they are there; without PyTorch, so that an error comes at once."""

from __future__ import annotations

from pathlib import Path

from emcl.data.mixture import training_patterns
from emcl.data.remote import is_remote
from emcl.data.settings import DataConfig
from emcl.data.shards import find_shards
from emcl.errors import UserError

SAMPLE = "sample"
"""The folder that the sample set is rendered in, and no other: others' shards, or a misspelt path to them, are no wish
for a sample set there."""


def wanted(data: DataConfig, *, training: bool) -> list[str]:
    """The patterns of all splits that a run reads; of an evaluation, the test split's.

    Raises:
        UserError: an evaluation of no split, or a set of `data.mixture` without shards.
    """
    if not training and not data.test:
        raise UserError("data.test names no shards to evaluate on")
    patterns = [*training_patterns(data), data.val, data.test] if training else [data.test]
    return [pattern for pattern in patterns if pattern]


def of_sample(data: DataConfig, patterns: list[str]) -> list[str]:
    """Those of `patterns` that rendering the sample set makes."""
    folder = Path(data.train).parent
    if not data.generate or folder.name != SAMPLE:
        return []
    return [pattern for pattern in patterns if Path(pattern).parent == folder]


def check_local(data: DataConfig, *, training: bool = True) -> None:
    """Finds shards that a run wants and this disk lacks, but for those that rendering makes.

    Raises:
        UserError: as `wanted`, or a pattern without its files.
    """
    patterns = wanted(data, training=training)
    made = of_sample(data, patterns)
    for pattern in patterns:
        if pattern not in made and not any(is_remote(part) for part in pattern.split("::")):
            find_shards(pattern)


def missing(patterns: list[str]) -> list[str]:
    """What `find_shards` says of each of `patterns` without its files."""
    wrong = []
    for pattern in patterns:
        try:
            find_shards(pattern)
        except UserError as error:
            wrong.append(str(error))
    return wrong
