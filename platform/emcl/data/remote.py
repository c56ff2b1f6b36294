"""Shards by URL: each is copied to a local cache once, checked for completeness, and read from there.

    data.train=https://host/shards/train-{000000..000015}.tar    or train-*.tar, where `emcl prepare` left an index.json

The cache is $EMCL_CACHE (default: ~/.cache/emcl). Several processes of a machine share one copy: the others wait.
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
"""Schemes that fsspec can write to; each except `file` needs its package (s3fs, gcsfs, adlfs)."""
SCHEMES = ("http", "https", *STORES)
"""An allow-list, because `pipe:` would run a command."""
TRIES, PATIENCE, AT_ONCE = 5, 1.0, 4
"""Number of attempts; seconds before the second, doubled each time; parallel copies."""
SILENCE = 60.0
"""Seconds without any data after which an attempt has failed."""
CHUNK = 2**20


def is_remote(pattern: str) -> bool:
    return "://" in pattern or pattern.startswith("pipe:")


def localise(pattern: str) -> list[Path]:
    """Local copies of a URL's shards: a single one, a brace pattern, or a glob where the folder has an index.json.

    Raises:
        UserError: an unknown scheme, no matching shard, or a shard that cannot be copied completely.
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
    """The local folder for all shards of the same remote folder as `url`."""
    folder, _, _ = url.rpartition("/")
    root = Path(os.environ.get("EMCL_CACHE") or Path.home() / ".cache" / "emcl")
    return root / "shards" / hashlib.sha256(folder.encode()).hexdigest()[:16]


def check_published(url: str) -> None:
    """Checks that `publish` can write to a URL, before shards are made for it.

    Raises:
        UserError: a scheme that cannot be written to, or a store that does not answer.
    """
    with _store(url, "shards would be published there, so none were made") as (store, root):
        store.makedirs(root, exist_ok=True)


@contextmanager
def _store(url: str, otherwise: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system of a URL, and the path in it; any failure becomes a UserError."""
    scheme = url.partition(":")[0]
    if scheme not in STORES:
        raise UserError(f"{url}: shards are written to {', '.join(STORES)} or local paths, not by {scheme}:")
    import fsspec

    try:
        yield fsspec.core.url_to_fs(url)
    except Exception as error:  # each store has its own exception classes
        raise UserError(f"{url}: not to be written ({first_line(error)}); {otherwise}") from None


def publish(folder: Path, url: str) -> int:
    """Copies a folder of shards to a URL, `index.json` last; shards already there as the index states are skipped.

    Returns how many shards were copied.

    Raises:
        UserError: a scheme that cannot be written to, or a store that refuses.
    """
    index = json.loads((folder / "index.json").read_text())
    others = [name for name in ("report.json", "index.json") if (folder / name).is_file()]
    with _store(url, f"the shards are whole in {folder}") as (store, root):
        published = _published(store, f"{root}/index.json")
        wanted = [
            name
            for name, facts in index["shards"].items()
            if published.get(name) != facts
            or not store.exists(f"{root}/{name}")
            or store.size(f"{root}/{name}") != facts["bytes"]
        ]
        store.makedirs(root, exist_ok=True)
        for name in tqdm([*wanted, *others], desc=f"copying to {url}", unit="file"):
            store.put_file(str(folder / name), f"{root}/{name}")
    return len(wanted)


def _published(store: Any, path: str) -> dict[str, Any]:
    """The shards listed by an index that was published before."""
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
    """The cached file; fetched if it is missing, or always with `again`."""
    path = cache_folder(url) / url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(path.with_name(f".{path.name}.lock")):
        if again or not path.is_file():
            _fetch(url, path, known)
    return path


def _fetch(url: str, path: Path, known: Mapping[str, Any] | None) -> None:
    partial_path = path.with_name(f".{path.name}.part")
    for attempt in range(TRIES):
        try:
            _download(url, partial_path, known)
            partial_path.replace(path)
            return
        except FileNotFoundError:
            raise UserError(f"{url}: not there") from None
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        except Exception as error:  # each file system has its own exception classes
            partial_path.unlink(missing_ok=True)
            if attempt + 1 == TRIES:
                reason = first_line(error)
                raise UserError(f"{url}: not to be had in {TRIES} tries ({reason})") from None
            time.sleep(PATIENCE * 2**attempt)


def _download(url: str, partial_path: Path, known: Mapping[str, Any] | None) -> None:
    """Raises OSError if the download is incomplete, or differs from the checksum in the index."""
    digest, count = hashlib.sha256(), 0
    with _open(url) as (source, promised), partial_path.open("wb") as out:
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
    """The stream, and its expected length.

    HTTP uses the standard library: fsspec sends two requests, and treats an error 500 as a missing file.
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
