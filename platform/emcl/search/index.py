"""An index of a folder's videos: what is in it, each window's embedding, and a FAISS index of their means.

    INDEX/clips.sqlite     files, windows, frame embeddings, and what they were made with
    INDEX/vectors.faiss    a unit vector a window, memory-mapped

A search takes the nearest means first and ranks those by the model's own similarity to their frames. Up to EXACT
windows the nearest are found exactly; above, by a graph (HNSW).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from emcl.data.decode import DecodeError
from emcl.errors import UserError
from emcl.inference import Span, VideoFeatures, VideoTextModel
from emcl.search.windows import Windows, videos_in

FORMAT = 1
EXACT = 200_000
"""Windows up to which the nearest are found exactly."""
CANDIDATES = 1000
"""Nearest means that are ranked by the model's own similarity."""
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, changed INTEGER);
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY, file INTEGER REFERENCES files(id) ON DELETE CASCADE, start REAL, stop REAL, frames BLOB
);
"""


@dataclass(frozen=True)
class Hit:
    """A window that was found."""

    path: str
    start: float
    end: float
    score: float


@dataclass(frozen=True)
class Changes:
    """What an update did."""

    added: int
    kept: int
    removed: int
    broken: dict[str, str]


class VideoIndex:
    """Opened for a model; made where there is none.

    Raises:
        UserError: the index was made with another model, windows or version.
    """

    def __init__(self, folder: Path, model: VideoTextModel, *, windows: Windows | None = None) -> None:
        self.folder, self.model = folder, model
        if windows is None and not (folder / "clips.sqlite").is_file():
            raise UserError(f"{folder}: no index there; make one with `emcl index DIR --model RUN --out {folder}`")
        folder.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(folder / "clips.sqlite")
        self._base.execute("PRAGMA foreign_keys = ON")
        self._base.executescript(_TABLES)
        self.windows = windows or Windows(float(self._fact("length") or 10.0), float(self._fact("overlap") or 5.0))
        facts = {
            "format": str(FORMAT), "model": model.fingerprint(), "length": str(self.windows.length),
            "overlap": str(self.windows.overlap),
        }  # fmt: skip
        for name, value in facts.items():
            if (found := self._fact(name)) not in (None, value):
                self.close()
                was = f"{folder} was made with another {name} ({found[:12]}, not {value[:12]})"
                raise UserError(f"{was}: give another --out, or that {name}")
        with self._base:
            self._base.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", list(facts.items()))
        self._vectors: Any = None

    def close(self) -> None:
        self._base.close()

    def __len__(self) -> int:
        return int(self._base.execute("SELECT count(*) FROM windows").fetchone()[0])

    def update(self, videos: Path) -> Changes:
        """Encodes new and changed files of a folder, forgets those that have gone.

        Files are named by their path below `videos`. A killed update goes on where it was.
        """
        there = {str(path.relative_to(videos)): path for path in videos_in(videos)}
        known = {
            path: (size, changed) for path, size, changed in self._base.execute("SELECT path, size, changed FROM files")
        }
        gone = [path for path in known if path not in there]
        new = [path for path, file in there.items() if known.get(path) != _state(file)]
        with self._base:
            self._base.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])
        broken = {}
        for path in tqdm(new, desc="indexing", unit="video", disable=len(new) < 2):
            try:
                self._add(path, there[path])
            except (DecodeError, UserError) as error:
                broken[path] = str(error)
        if new or gone or not (self.folder / "vectors.faiss").is_file():
            self._write_vectors()
        return Changes(len(new) - len(broken), len(there) - len(new), len(gone), broken)

    def _add(self, path: str, file: Path) -> None:
        spans = self.windows.of_file(file)
        features = self.model.encode_video([Span(file, start, end) for start, end in spans])
        with self._base:  # a file is in the index whole or not at all
            self._base.execute("DELETE FROM files WHERE path = ?", (path,))
            (number,) = self._base.execute(
                "INSERT INTO files (path, size, changed) VALUES (?, ?, ?) RETURNING id", (path, *_state(file))
            ).fetchone()
            for (start, end), frames, mask in zip(spans, features.frames, features.mask, strict=True):
                content = frames[mask].numpy().astype(np.float32).tobytes()
                self._base.execute(
                    "INSERT INTO windows (file, start, stop, frames) VALUES (?, ?, ?, ?)", (number, start, end, content)
                )

    def search(self, text: str, top: int = 10) -> list[Hit]:
        """Windows that a sentence fits best, by the model's own similarity."""
        query = self.model.encode_text(text)
        numbers = self._nearest(query, max(CANDIDATES, top))
        if not numbers:
            return []
        scores = self.model.similarity(query, self._features(numbers))[0]
        best = scores.topk(min(top, len(numbers)))
        chosen = [
            (numbers[place], score) for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return [self._hit(number, score) for number, score in chosen]

    def search_by_video(self, video: Path, top: int = 10) -> list[Hit]:
        """Windows that look most like a video: the cosine of their frames' means."""
        mean = self.model.encode_video(video).mean()
        found = self._nearest(mean, top)
        means = torch.nn.functional.normalize(self._features(found).mean(), dim=-1)
        scores = (means @ torch.nn.functional.normalize(mean, dim=-1)[0]).tolist()
        return [self._hit(number, score) for number, score in zip(found, scores, strict=True)]

    def _nearest(self, query: torch.Tensor, count: int) -> list[int]:
        import faiss

        if self._vectors is None:
            path = self.folder / "vectors.faiss"
            if not path.is_file():
                raise UserError(f"{self.folder}: the index was not finished; run `emcl index` again")
            self._vectors = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        unit = torch.nn.functional.normalize(query, dim=-1).numpy().astype(np.float32)
        _, numbers = self._vectors.search(unit, min(count, max(1, self._vectors.ntotal)))
        return [int(number) for number in numbers[0] if number >= 0]

    def _write_vectors(self) -> None:
        """All windows' means; written beside and renamed."""
        faiss = faiss_package()
        width = int(self.model.model.backbone.embed_dim)
        count = len(self)
        flat: Any = faiss.IndexFlatIP(width)
        if count > EXACT:
            flat = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        vectors = faiss.IndexIDMap2(flat)
        for numbers, means in self._means(width):
            vectors.add_with_ids(means, numbers)
        part = self.folder / ".vectors.part"
        faiss.write_index(vectors, str(part))
        part.replace(self.folder / "vectors.faiss")
        self._vectors = None

    def _means(self, width: int, block: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with closing(self._base.execute("SELECT id, frames FROM windows ORDER BY id")) as rows:
            while part := rows.fetchmany(block):
                means = np.stack([np.frombuffer(frames, np.float32).reshape(-1, width).mean(0) for _, frames in part])
                means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
                yield np.array([number for number, _ in part], np.int64), means.astype(np.float32)

    def _features(self, numbers: list[int]) -> VideoFeatures:
        frames_per_video, width = self.model.config.data.frames, int(self.model.model.backbone.embed_dim)
        frames = torch.zeros(len(numbers), frames_per_video, width)
        mask = torch.zeros(len(numbers), frames_per_video, dtype=torch.bool)
        for row, number in enumerate(numbers):
            (content,) = self._base.execute("SELECT frames FROM windows WHERE id = ?", (number,)).fetchone()
            found = torch.from_numpy(np.frombuffer(content, np.float32).reshape(-1, width).copy())
            frames[row, : len(found)], mask[row, : len(found)] = found, True
        return VideoFeatures(frames, mask)

    def _hit(self, number: int, score: float) -> Hit:
        path, start, end = self._base.execute(
            "SELECT path, start, stop FROM windows JOIN files ON files.id = windows.file WHERE windows.id = ?",
            (number,),
        ).fetchone()
        return Hit(path, start, end, score)

    def _fact(self, name: str) -> str | None:
        found = self._base.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else None


def faiss_package() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("the index wants FAISS: pip install -e '.[search]' (or faiss-cpu)") from None
    return faiss


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
