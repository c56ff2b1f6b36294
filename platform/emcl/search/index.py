"""An index of a folder's videos: files, windows, frame embeddings, and a FAISS index of each window's mean embedding.

    INDEX/clips.sqlite     files, windows, frame embeddings, and the model and settings that made them
    INDEX/vectors.faiss    one unit vector per window, memory-mapped
    INDEX/emcl.pt          the compact EMCL of the collection, if made with `--emcl`

A search first takes the nearest means, then ranks these by the model's own similarity to their frames. Up to EXACT
windows the nearest-neighbour search is exact; above, it uses 8-bit quantised vectors, a quarter of the memory and of
the bytes that a search reads. The quantisation error matters little, because the 1,000 nearest are re-ranked with the
exact embeddings (benchmarks/index_speed.py measures this on random vectors, the hardest case, where graph and
inverted-file indexes lose most neighbours).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
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
from emcl.model.emcl_layer import EMCLLayer
from emcl.search.windows import Windows, videos_in

FORMAT = 2
EXACT = 200_000
"""Largest number of windows with exact nearest-neighbour search."""
CANDIDATES = 1000
"""Number of nearest windows that are re-ranked by the model's own similarity."""
FITTED = 10_000
"""Approximate number of windows that the EMCL of a collection is fitted on."""
_BY_PATH = "SELECT windows.id FROM windows JOIN files ON files.id = windows.file ORDER BY path, start, windows.id"
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, changed INTEGER);
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY, file INTEGER REFERENCES files(id) ON DELETE CASCADE, start REAL, stop REAL, frames BLOB
);
"""


VECTORS, LAYER = "vectors.faiss", "emcl.pt"


@dataclass(frozen=True)
class Hit:
    """A window in a search result."""

    path: str
    start: float
    end: float
    score: float
    window: int
    """The window's number in this index."""


@dataclass(frozen=True)
class Window:
    """A window as stored in the index."""

    number: int
    file: Path
    path: str
    """Path relative to the indexed folder."""
    start: float
    end: float


@dataclass(frozen=True)
class Changes:
    """Number of files changed by an update, and files that failed with the reason."""

    added: int
    kept: int
    removed: int
    broken: dict[str, str]


class VideoIndex:
    """Opens the index of a folder for a model, or creates it. Reading is thread-safe.

    Raises:
        UserError: the index was made with another model, other windows or another version.
    """

    def __init__(self, folder: Path, model: VideoTextModel, *, windows: Windows | None = None) -> None:
        self.folder, self.model = folder, model
        if windows is None:
            check_index(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(folder / "clips.sqlite", check_same_thread=False)
        self._base.execute("PRAGMA foreign_keys = ON")
        self._base.executescript(_TABLES)
        self.windows = windows or self._kept_windows()
        facts = {
            "format": str(FORMAT), "model": model.fingerprint(), "length": str(self.windows.length),
            "overlap": str(self.windows.overlap), "cut": self.windows.cut,
        }  # fmt: skip
        for name, value in facts.items():
            if (stored := self._fact(name)) not in (None, value):
                self.close()
                was = f"{folder} was made with another {name} ({stored[:12]}, not {value[:12]})"
                raise UserError(f"{was}: give another --out, or that {name}")
        with self._base:
            self._base.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", list(facts.items()))
        self._vectors: tuple[int, Any] | None = None
        self._all: tuple[int, list[int], VideoFeatures] | None = None
        if (folder / LAYER).is_file():
            model.module = EMCLLayer.load(folder / LAYER).to(model.device)

    def close(self) -> None:
        self._base.close()

    def __len__(self) -> int:
        return int(self._base.execute("SELECT count(*) FROM windows").fetchone()[0])

    def update(self, videos: Path, *, emcl: bool = False) -> Changes:
        """Encodes new and changed files of a folder and removes deleted ones from the index.

        Files are identified by their path relative to `videos`. An update that was killed can be resumed.

        Args:
            emcl: fit the compact EMCL to the collection, for a model without EMCL.
        """
        if emcl:
            self.model.check_no_emcl()
        present = {str(path.relative_to(videos)): path for path in videos_in(videos)}
        known = {
            path: (size, changed) for path, size, changed in self._base.execute("SELECT path, size, changed FROM files")
        }
        gone = [path for path in known if path not in present]
        new = [path for path, file in present.items() if known.get(path) != _state(file)]
        with self._base:
            self._base.execute("INSERT OR REPLACE INTO facts VALUES ('root', ?)", (str(videos.resolve()),))
            self._base.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])
            if new or gone:  # stays set until the vectors match the files, even if this call is killed
                self._base.execute("INSERT OR REPLACE INTO facts VALUES ('vectors', 'old')")
        broken = {}
        spans_of_files = self.windows.of_files(present[path] for path in new)
        for path, spans in zip(
            tqdm(new, desc="indexing", unit="video", disable=len(new) < 2), spans_of_files, strict=True
        ):
            try:
                if isinstance(spans, DecodeError):
                    raise spans
                self._add(path, present[path], spans)
            except (DecodeError, UserError) as error:
                broken[path] = str(error)
        if self._fact("vectors") or not (self.folder / VECTORS).is_file():
            self._write_vectors()
        if emcl and len(self):
            self._fit_layer()
        return Changes(len(new) - len(broken), len(present) - len(new), len(gone), broken)

    def _add(self, path: str, file: Path, spans: Sequence[tuple[float, float]]) -> None:
        features = self.model.encode_video([Span(file, start, end) for start, end in spans], progress=False)
        with self._base:  # one transaction per file
            self._base.execute("DELETE FROM files WHERE path = ?", (path,))
            (number,) = self._base.execute(
                "INSERT INTO files (path, size, changed) VALUES (?, ?, ?) RETURNING id", (path, *_state(file))
            ).fetchone()
            for (start, end), frames, mask in zip(spans, features.frames, features.mask, strict=True):
                content = frames[mask].numpy().astype(np.float32).tobytes()
                self._base.execute(
                    "INSERT INTO windows (file, start, stop, frames) VALUES (?, ?, ?, ?)", (number, start, end, content)
                )

    def _fit_layer(self) -> None:
        """Fits the compact EMCL on a sample of about FITTED windows."""
        step = max(1, len(self) // FITTED)
        rows = self._base.execute("SELECT id FROM windows WHERE id % ? = 0 ORDER BY id LIMIT ?", (step, 2 * FITTED))
        self.model.fit_emcl(self.features([number for (number,) in rows]))
        assert self.model.module is not None
        self.model.module.save(self.folder / LAYER)

    def search(self, text: str, top: int = 10) -> list[Hit]:
        """The best windows for a sentence, by the model's own similarity."""
        return self.search_all([text], top)[0]

    def search_all(self, texts: Sequence[str], top: int = 10) -> list[list[Hit]]:
        """The best windows for each sentence.

        An index with at most CANDIDATES windows is compared in the order and tiles of an evaluation, so that the
        ranking equals an evaluation of these sentences for every variant of EMCL; but that the slots of absent frames,
        which an index does not keep, change the length of short videos' rows, and so the reference's scores a little.
        """
        queries = self.model.encode_text(texts)
        if len(self) <= CANDIDATES:
            return self._ranked(queries, *self._everything(), top)
        hits = []
        for query in queries.split(1):
            numbers = list(self._windows(self._nearest(query, max(CANDIDATES, top))))
            hits += self._ranked(query, numbers, self.features(numbers), top)
        return hits

    def _everything(self) -> tuple[list[int], VideoFeatures]:
        """All window numbers and features, kept in memory; only for small indexes."""
        written = self._written()
        if self._all is None or self._all[0] != written:
            numbers = [number for (number,) in self._base.execute(_BY_PATH)]
            self._all = written, numbers, self.features(numbers)
        return self._all[1:]

    def _ranked(self, queries: torch.Tensor, numbers: list[int], features: VideoFeatures, top: int) -> list[list[Hit]]:
        if not numbers:
            return [[] for _ in queries]
        best = self.model.similarity(queries, features).topk(min(top, len(numbers)))
        windows = self._windows({numbers[index] for indices in best.indices.tolist() for index in indices})
        return [
            [
                self._hit(windows[numbers[index]], score)
                for score, index in zip(scores, indices, strict=True)
                if numbers[index] in windows
            ]
            for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def search_by_video(self, video: Path, top: int = 10) -> list[Hit]:
        """The windows most similar to a video."""
        return self.search_by_features(self.model.encode_video(video), top)

    def search_by_features(self, video: VideoFeatures, top: int = 10) -> list[Hit]:
        """The windows most similar to an encoded video, by the cosine of mean frame embeddings."""
        mean = video.mean()
        windows = self._windows(self._nearest(mean, max(CANDIDATES, top)))
        if not windows:
            return []
        means = torch.nn.functional.normalize(self.features(list(windows)).mean(), dim=-1)
        best = (means @ torch.nn.functional.normalize(mean, dim=-1)[0]).topk(min(top, len(windows)))
        candidates = list(windows.values())
        return [
            self._hit(candidates[index], score)
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def window(self, number: int) -> Window | None:
        """None if the index has no such window (any more), or its file is no longer in the folder."""
        window = self._windows([number]).get(number)
        root = Path(self._fact("root") or ".")
        if window is None or not window.file.is_file() or not window.file.resolve().is_relative_to(root):
            return None
        return window

    def neighbours(self, number: int) -> list[Window]:
        """All windows of the same file, in order of time."""
        rows = self._base.execute(
            "SELECT id FROM windows WHERE file = (SELECT file FROM windows WHERE id = ?) ORDER BY start, id", (number,)
        )
        return list(self._windows([neighbour for (neighbour,) in rows]).values())

    def _windows(self, numbers: Collection[int]) -> dict[int, Window]:
        """Number -> window, in the given order; numbers that are no longer in the index are skipped."""
        root = Path(self._fact("root") or ".")
        rows = self._base.execute(
            "SELECT windows.id, path, start, stop FROM windows JOIN files ON files.id = windows.file "
            "WHERE windows.id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(numbers)),),
        )
        by_number = {number: Window(number, root / path, path, start, stop) for number, path, start, stop in rows}
        return {number: by_number[number] for number in numbers if number in by_number}

    def _nearest(self, query: torch.Tensor, count: int) -> list[int]:
        written = self._written()
        if self._vectors is None or self._vectors[0] != written:
            faiss = faiss_package()
            self._vectors = written, faiss.read_index(str(self.folder / VECTORS), faiss.IO_FLAG_MMAP_IFC)
        vectors = self._vectors[1]
        unit = torch.nn.functional.normalize(query, dim=-1).numpy().astype(np.float32)
        _, numbers = vectors.search(unit, min(count, max(1, vectors.ntotal)))
        return [int(number) for number in numbers[0] if number >= 0]

    def _written(self) -> int:
        """Modification time of the vectors: `emcl index` may update them while they are searched.

        Raises:
            UserError: there are no vectors.
        """
        try:
            return (self.folder / VECTORS).stat().st_mtime_ns
        except FileNotFoundError:
            raise UserError(f"{self.folder}: the index was not finished; run `emcl index` again") from None

    def _write_vectors(self) -> None:
        """Writes all windows' means to a temporary file, then renames it."""
        width, count = int(self.model.model.backbone.embed_dim), len(self)
        vectors = vectors_for(count, width)
        for number, (numbers, means) in enumerate(self._means(width)):
            if number == 0:
                vectors.train(means)
            vectors.add_with_ids(means, numbers)
        temporary = self.folder / ".vectors.part"
        faiss_package().write_index(vectors, str(temporary))
        temporary.replace(self.folder / VECTORS)
        with self._base:
            self._base.execute("DELETE FROM facts WHERE name = 'vectors'")
        self._vectors = None

    def _means(self, width: int, block: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with closing(self._base.execute("SELECT id, frames FROM windows ORDER BY id")) as rows:
            while chunk := rows.fetchmany(block):
                means = np.stack([np.frombuffer(frames, np.float32).reshape(-1, width).mean(0) for _, frames in chunk])
                means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
                yield np.array([number for number, _ in chunk], np.int64), means.astype(np.float32)

    def features(self, numbers: Sequence[int]) -> VideoFeatures:
        """Frame embeddings of windows, in the given order.

        Raises:
            KeyError: a number that is not in the index.
        """
        frames_per_video, width = self.model.config.data.frames, int(self.model.model.backbone.embed_dim)
        frames = torch.zeros(len(numbers), frames_per_video, width)
        mask = torch.zeros(len(numbers), frames_per_video, dtype=torch.bool)
        contents = dict(
            self._base.execute(
                "SELECT id, frames FROM windows WHERE id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(numbers)),),
            )
        )
        for row, number in enumerate(numbers):
            embeddings = torch.frombuffer(bytearray(contents[number]), dtype=torch.float32).view(-1, width)
            frames[row, : len(embeddings)], mask[row, : len(embeddings)] = embeddings, True
        return VideoFeatures(frames, mask)

    @staticmethod
    def _hit(window: Window, score: float) -> Hit:
        return Hit(window.path, window.start, window.end, score, window.number)

    def _kept_windows(self) -> Windows:
        kept = Windows()
        return Windows(
            float(self._fact("length") or kept.length),
            float(self._fact("overlap") or kept.overlap),
            self._fact("cut") or kept.cut,
        )

    def _fact(self, name: str) -> str | None:
        row = self._base.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None


def vectors_for(count: int, width: int) -> Any:
    """An empty FAISS index for `count` unit vectors, to be added with their window numbers."""
    faiss = faiss_package()
    if count <= EXACT:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    kind = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexIDMap2(faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT))


def check_index(folder: Path) -> None:
    """Raises UserError if the folder has no index."""
    if not (folder / "clips.sqlite").is_file():
        raise UserError(f"{folder}: no index there; make one with `emcl index DIR --model RUN --out {folder}`")


def faiss_package() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("the index wants FAISS: pip install -e '.[search]' (or faiss-cpu)") from None
    return faiss


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
