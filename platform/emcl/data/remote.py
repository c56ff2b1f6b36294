"""Shards by URL: each is copied to a local cache once, whole and checked, and read from there.

    data.train=https://host/shards/train-{000000..000015}.tar    or train-*.tar, where `emcl prepare` left an index.json

The cache is $EMCL_CACHE, ~/.cache/emcl where not set. Several processes of a machine wait for one copy.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from tqdm import tqdm

from emcl.disk import in_turn
from emcl.errors import UserError, first_line

STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "file")
"""What fsspec writes to; each but `file` wants its package (s3fs, gcsfs, adlfs)."""
SCHEMES = ("http", "https", *STORES)
"""An allow-list: `pipe:` would run a command."""
TRIES, PATIENCE, AT_ONCE = 5, 1.0, 4
"""Attempts; seconds before the second, doubled each time; copies at once."""
SILENCE = 60.0
"""Seconds without a byte, after which an attempt has failed."""
CHUNK = 2**20


def is_remote(pattern: str) -> bool:
    return "://" in pattern or pattern.startswith("pipe:")


def localise(pattern: str) -> list[Path]:
    """Local copies of a URL's shards: a single one, a brace pattern, or a glob where the folder has an index.json.

    Raises:
        UserError: an unknown scheme, nothing there, or a shard that cannot be had whole.
    """
    scheme = pattern.partition(":")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{pattern}: shards are read from {', '.join(SCHEMES)} or local paths, not by {scheme}:")
    if not any(sign in pattern for sign in "*?["):
        urls = list(braceexpand(pattern))
        known: Mapping[str, Any] = {}
    else:
        folder, _, wanted = pattern.rpartition("/")
        known = _index(folder)
        urls = [f"{folder}/{name}" for name in sorted(known) if fnmatch.fnmatchcase(name, wanted)]
        if not urls:
            raise UserError(f"{pattern}: no such shard in {folder}/index.json (it lists {len(known)})")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copies = pool.map(lambda url: _copy(url, known.get(url.rpartition("/")[2])), urls)
        bar = tqdm(copies, total=len(urls), desc=f"copying {pattern}", unit="shard", disable=len(urls) < 2)
        return list(bar)


def cache_folder(url: str) -> Path:
    """Of the shards beside `url`."""
    folder, _, _ = url.rpartition("/")
    root = Path(os.environ.get("EMCL_CACHE") or Path.home() / ".cache" / "emcl")
    return root / "shards" / hashlib.sha256(folder.encode()).hexdigest()[:16]


def check_published(url: str) -> None:
    """Whether `publish` can reach a URL, before shards are made for it.

    Raises:
        UserError: a scheme that cannot be written to, or a store that does not answer.
    """
    with _store(url, "shards would be published there, so none were made") as (store, root):
        store.makedirs(root, exist_ok=True)


@contextmanager
def _store(url: str, otherwise: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system behind a URL and the path there; what goes wrong is one error for the user."""
    scheme = url.partition(":")[0]
    if scheme not in STORES:
        raise UserError(f"{url}: shards are written to {', '.join(STORES)} or local paths, not by {scheme}:")
    import fsspec

    try:
        yield fsspec.core.url_to_fs(url)
    except Exception as error:  # each store has its own kinds
        raise UserError(f"{url}: not to be written ({first_line(error)}); {otherwise}") from None


def publish(folder: Path, url: str) -> int:
    """Copies a folder of shards to a URL, its `index.json` last; what stands there as the index says is left.

    Returns how many shards were copied.

    Raises:
        UserError: a scheme that cannot be written to, or a store that refuses.
    """
    index = json.loads((folder / "index.json").read_text())
    others = [name for name in ("report.json", "index.json") if (folder / name).is_file()]
    with _store(url, f"the shards are whole in {folder}") as (store, root):
        there = _published(store, f"{root}/index.json")
        wanted = [
            name
            for name, facts in index["shards"].items()
            if there.get(name) != facts
            or not store.exists(f"{root}/{name}")
            or store.size(f"{root}/{name}") != facts["bytes"]
        ]
        store.makedirs(root, exist_ok=True)
        for name in tqdm([*wanted, *others], desc=f"copying to {url}", unit="file"):
            store.put_file(str(folder / name), f"{root}/{name}")
    return len(wanted)


def _published(store: Any, path: str) -> dict[str, Any]:
    """The shards of an index that is there already."""
    try:
        return dict(json.loads(store.cat_file(path))["shards"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _index(folder: str) -> dict[str, Any]:
    path = _copy(f"{folder}/index.json", None, again=True)
    try:
        return dict(json.loads(path.read_text())["shards"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/index.json is not the index that `emcl prepare` writes") from None


def _copy(url: str, known: Mapping[str, Any] | None, *, again: bool = False) -> Path:
    """The cached file; fetched where it is missing, or `again`."""
    path = cache_folder(url) / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(path.with_name(f".{path.name}.lock")):
        if again or not path.is_file():
            _fetch(url, path, known)
    return path


def _fetch(url: str, path: Path, known: Mapping[str, Any] | None) -> None:
    part = path.with_name(f".{path.name}.part")
    for attempt in range(TRIES):
        try:
            _download(url, part, known)
            part.replace(path)
            return
        except FileNotFoundError:
            raise UserError(f"{url}: not there") from None
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        except Exception as error:  # each file system has its own kinds
            part.unlink(missing_ok=True)
            if attempt + 1 == TRIES:
                reason = first_line(error)
                raise UserError(f"{url}: not to be had in {TRIES} tries ({reason})") from None
            time.sleep(PATIENCE * 2**attempt)


def _download(url: str, part: Path, known: Mapping[str, Any] | None) -> None:
    """Raises OSError where less arrived than was promised, or something else than the index says."""
    digest, count = hashlib.sha256(), 0
    with _open(url) as (source, promised), part.open("wb") as out:
        while chunk := source.read(CHUNK):
            out.write(chunk)
            digest.update(chunk)
            count += len(chunk)
    if promised is not None and count != promised:
        raise OSError(f"{count} of {promised} bytes arrived")
    if known is not None and digest.hexdigest() != known["sha256"]:
        raise OSError(f"its checksum is not that of index.json, {count} bytes")


@contextmanager
def _open(url: str) -> Iterator[tuple[Any, int | None]]:
    """The stream, and how long it should be.

    HTTP goes by the standard library: fsspec asks twice, and takes an error 500 for a missing file.
    """
    if url.startswith("http"):
        try:
            with urllib.request.urlopen(url, timeout=SILENCE) as answer:
                length = answer.headers.get("Content-Length")
                yield answer, int(length) if length else None
        except urllib.error.HTTPError as error:
            raise FileNotFoundError(url) if error.code in (404, 410) else OSError(f"it answers {error.code}") from None
        return
    import fsspec

    with fsspec.open(url, "rb") as source:
        yield source, getattr(source, "size", None)
