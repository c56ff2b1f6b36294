"""Checks a folder of shards against its index, and against the benchmark's expected counts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emcl.data.decode import DecodeError, decode
from emcl.data.shards import ShardSet
from emcl.errors import UserError
from emcl.prepare.benchmarks import BENCHMARKS
from emcl.prepare.sharding import INDEX


@dataclass
class Verdict:
    """Result of the check; `wrong` is empty if the folder matches its index."""

    table: str = ""
    wrong: list[str] = field(default_factory=list)


def verify(folder: Path, *, decode_all: bool = False, progress: bool = True) -> Verdict:
    """Checks checksum, counts and JSON of every shard; with `decode_all`, also decodes a frame of every video.

    Raises:
        UserError: the folder has no index.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no {INDEX}: `emcl prepare` writes it once all shards are there")
    index = json.loads((folder / INDEX).read_text())
    verdict = Verdict()
    counted: dict[str, Counter[str]] = {}
    for name, known in tqdm(index["shards"].items(), desc="verifying", unit="shard", disable=not progress):
        wrong = _check_shard(folder / name, known, counted, decode_all=decode_all)
        verdict.wrong += [f"{name}: {reason}" for reason in wrong]
    listed = set(index["shards"])
    verdict.wrong += [
        f"{path.name}: not in {INDEX}" for path in sorted(folder.glob("*.tar")) if path.name not in listed
    ]
    for split, counts in index["splits"].items():
        if dict(counted.get(split, Counter())) != {key: value for key, value in counts.items() if value}:
            verdict.wrong.append(f"{split}: {dict(counted.get(split, {}))} found, {counts} in {INDEX}")
    verdict.table = _table(index, counted)
    return verdict


def _check_shard(path: Path, known: dict[str, Any], counted: dict[str, Counter[str]], *, decode_all: bool) -> list[str]:
    if not path.is_file():
        return ["missing"]
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]:
            return [f"its checksum is not that of {INDEX} ({path.stat().st_size} bytes, {known['bytes']} expected)"]
    try:
        shards = ShardSet([path])
    except UserError as error:
        return [str(error)]
    counts = counted.setdefault(path.name.rpartition("-")[0], Counter())
    wrong = []
    for row in shards.rows:
        sample = row.sample
        counts.update(
            {
                key: value
                for key, value in (("samples", 1), ("captions", len(sample.captions)), ("questions", len(sample.qa)))
                if value
            }
        )
        if decode_all:
            try:
                decode(shards.read(row), frames=1, size=32, start=sample.start, end=sample.end)
            except DecodeError as error:
                wrong.append(f"{sample.id} does not decode: {error}")
    return wrong


def _table(index: dict[str, Any], counted: dict[str, Counter[str]]) -> str:
    """A table of the actual and the expected counts."""
    benchmark = BENCHMARKS.get(index["source"])
    expected = benchmark.protocols.get(index["protocol"], {}) if benchmark else {}
    lines = [f"{index['source']} {index['protocol']}".strip()]
    lines.append(f"{'':<8}{'videos':>10}{'of':>10}{'captions':>11}{'questions':>11}{'of':>10}")
    for split in dict.fromkeys([*expected, *counted]):
        counts = counted.get(split, Counter())
        videos, texts = (f"{number:,}" for number in expected[split]) if split in expected else ("", "")
        lines.append(
            f"{split:<8}{counts['samples']:>10,}{videos:>10}{counts['captions']:>11,}{counts['questions']:>11,}{texts:>10}"
        )
    return "\n".join(lines)
