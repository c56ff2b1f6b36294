"""Which shards a run needs, and whether they exist; does not import PyTorch, so that errors appear at once."""

from __future__ import annotations

from pathlib import Path

from emcl.data.data_settings import DataConfig
from emcl.data.mixture import training_patterns
from emcl.data.remote import is_remote
from emcl.data.shards import find_shards
from emcl.errors import UserError

SAMPLE = "sample"
"""The sample set is rendered only in a folder of this name: a missing or misspelt path to other shards must not create
a sample set there."""


def wanted(data: DataConfig, *, training: bool) -> list[str]:
    """The patterns of all splits that a run reads; for an evaluation, only the test split's.

    Raises:
        UserError: an evaluation without a test split, or a set of `data.mixture` without shards.
    """
    if not training and not data.test:
        raise UserError("data.test names no shards to evaluate on")
    patterns = [*training_patterns(data), data.val, data.test] if training else [data.test]
    return [pattern for pattern in patterns if pattern]


def of_sample(data: DataConfig, patterns: list[str]) -> list[str]:
    """Those of `patterns` that rendering the sample set creates."""
    folder = Path(data.train).parent
    if not data.generate or folder.name != SAMPLE:
        return []
    return [pattern for pattern in patterns if Path(pattern).parent == folder]


def check_local(data: DataConfig, *, training: bool = True) -> None:
    """Checks that all local shards of a run exist, except those that rendering creates.

    Raises:
        UserError: as `wanted`, or a pattern without matching files.
    """
    patterns = wanted(data, training=training)
    made = of_sample(data, patterns)
    for pattern in patterns:
        if pattern not in made and not any(is_remote(one_pattern) for one_pattern in pattern.split("::")):
            find_shards(pattern)


def missing(patterns: list[str]) -> list[str]:
    """The error of `find_shards` for each of `patterns` without matching files."""
    wrong = []
    for pattern in patterns:
        try:
            find_shards(pattern)
        except UserError as error:
            wrong.append(str(error))
    return wrong
