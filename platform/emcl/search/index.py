"""An index of a folder's videos: files, windows, frame embeddings, and a FAISS index of one vector a window.

    INDEX/clips.sqlite     files, windows, frame embeddings, and the model and settings that made them
    INDEX/vectors.faiss    one vector per window, memory-mapped
    INDEX/emcl.pt          the compact EMCL of the collection, if made with `--emcl`
    INDEX/factors.npz      the shared factors of pairs from it, if made with `--emcl PAIRS.csv`

A vector is the window's mean embedding, made a unit vector, and with shared factors, the model's or the index's own,
their K + 2 numbers: a product with a query's is the cosine and the log-likelihood ratio in one. A search first takes
the nearest by it (search/vectors.py), then ranks these by the model's own similarity to their frames.
"""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from emcl.data.decode import DecodeError
from emcl.em import SharedFactors
from emcl.errors import UserError
from emcl.features import TextFeatures, VideoFeatures
from emcl.given_videos import Span
from emcl.inference import VideoTextModel
from emcl.model.emcl_layer import EMCLLayer
from emcl.model.pair_scores import NO_FACTORS, fingerprint_of
from emcl.prepare.clips import Clip
from emcl.run_folder import FACTORS
from emcl.search.hits import Changes, Hit, Window
from emcl.search.pairs_of_files import fit_to_pairs, paths_of
from emcl.search.vectors import Vectors
from emcl.search.windows import Windows, videos_in

FORMAT = 3
CANDIDATES = 1000
"""Number of nearest windows that are re-ranked by the model's own similarity."""
FITTED = 10_000
"""Approximate number of windows that the EMCL of a collection is fitted on."""
_BY_PATH = "SELECT windows.id FROM windows JOIN files ON files.id = windows.file ORDER BY path, start, windows.id"
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, changed INTEGER);
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY, file INTEGER REFERENCES files(id) ON DELETE CASCADE, start REAL, stop REAL, frames BLOB,
    outputs BLOB
);
CREATE INDEX IF NOT EXISTS windows_of_files ON windows (file);
"""


LAYER = "emcl.pt"


class VideoIndex:
    """Opens the index of a folder for a model, or creates it. Reading is thread-safe.

    Raises:
        UserError: the index was made with another model, other windows or another version.
    """

    def __init__(self, folder: Path, model: VideoTextModel, *, windows: Windows | None = None) -> None:
        self.folder, self.model = folder, copy.copy(model)  # which compares by what the index was made with
        self._own_factors = model.factors
        self._updating = windows is not None
        if windows is None:
            check_index(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(folder / "clips.sqlite", check_same_thread=False)
        self._base.execute("PRAGMA foreign_keys = ON")
        self._base.executescript(_TABLES)
        self.windows = windows or self._kept_windows()
        if (made_by := self._fact("format")) not in (None, str(FORMAT)):
            self.close()
            again = "make it anew in another folder: emcl index DIR --model RUN --out OTHER"
            raise UserError(f"{folder} was made by another version (format {made_by}, not {FORMAT}): {again}")
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
        self._vectors = Vectors(folder)
        self._checked: int | None = None
        self._all: tuple[int, list[int], VideoFeatures] | None = None
        if (folder / LAYER).is_file():
            self.model.module = EMCLLayer.load(folder / LAYER).to(model.device)
        self._take_factors()

    def _take_factors(self) -> None:
        """Those of the index's own pairs, if it has some; else the model's, but for an index that was made without."""
        try:
            of_pairs = SharedFactors.load(self.folder / FACTORS) if (self.folder / FACTORS).is_file() else None
        except ValueError as error:
            self.close()
            raise UserError(f"{error}: delete the file, and run `emcl index` again") from None
        without = not self._updating and self._fact("factors") == NO_FACTORS
        self.model.factors = of_pairs or (None if without else self._own_factors)

    def _written(self) -> int:
        """Modification time of the vectors, which are those of the factors that the model has: `emcl index` may write
        both anew while they are searched.

        Raises:
            UserError: there are no vectors, or those of other factors.
        """
        written = self._vectors.written()
        if written != self._checked:
            self._take_factors()
            if self._fact("factors") != fingerprint_of(self.model.factors):
                raise UserError(f"{self.folder} was made with other shared factors, or changes; run `emcl index` again")
            self._checked = written
        return written

    def close(self) -> None:
        self._base.close()

    def __len__(self) -> int:
        return int(self._base.execute("SELECT count(*) FROM windows").fetchone()[0])

    def update(self, videos: Path, *, emcl: bool = False, sentences: Sequence[str] = ()) -> Changes:
        """Encodes new and changed files of a folder and removes deleted ones from the index.

        Files are identified by their path relative to `videos`. An update that was killed can be resumed.

        Args:
            emcl: fit the compact EMCL to the collection, for a model without EMCL.
            sentences: such as its captions, to which that is fitted too.
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
        of_others = self._fact("factors") != fingerprint_of(self.model.factors)
        if of_others or self._fact("vectors") or not self._vectors.path.is_file():
            self._write_vectors()
        if emcl and len(self):
            self._fit_layer(sentences)
        return Changes(len(new) - len(broken), len(present) - len(new), len(gone), broken)

    def _add(self, path: str, file: Path, spans: Sequence[tuple[float, float]]) -> None:
        features = self.model.encode_video([Span(file, start, end) for start, end in spans], progress=False)
        with self._base:  # one transaction per file
            self._base.execute("DELETE FROM files WHERE path = ?", (path,))
            (number,) = self._base.execute(
                "INSERT INTO files (path, size, changed) VALUES (?, ?, ?) RETURNING id", (path, *_state(file))
            ).fetchone()
            assert features.outputs is not None
            for row, (start, end) in enumerate(spans):
                frames = features.frames[row][features.mask[row]]
                blobs = [numbers.numpy().astype(np.float32).tobytes() for numbers in (frames, features.outputs[row])]
                self._base.execute(
                    "INSERT INTO windows (file, start, stop, frames, outputs) VALUES (?, ?, ?, ?, ?)",
                    (number, start, end, *blobs),
                )

    def _fit_layer(self, sentences: Sequence[str]) -> None:
        """Fits the compact EMCL on a sample of about FITTED windows."""
        step = max(1, len(self) // FITTED)
        rows = self._base.execute("SELECT id FROM windows WHERE id % ? = 0 ORDER BY id LIMIT ?", (step, 2 * FITTED))
        features = self.features([number for (number,) in rows])
        self.model.fit_emcl(features, self.model.encode_text(sentences) if sentences else None)
        assert self.model.module is not None
        self.model.module.save(self.folder / LAYER)

    def fit_pairs(self, pairs: Sequence[Clip], videos: Path) -> None:
        """Fits shared factors to files of the indexed folder, or parts of them, with their captions.

        They are kept with the index, which is searched with them from then on and no more with the model's own.

        Raises:
            UserError: a file is not in the folder, or no factors can be fitted to the pairs.
        """
        paths = paths_of(pairs, videos)
        fit_to_pairs(self.model, pairs, paths, map(self._outputs_of, pairs, paths))
        assert self.model.factors is not None
        self.model.factors.save(self.folder / FACTORS)
        self._write_vectors()

    def _outputs_of(self, part: Clip, path: str) -> list[np.ndarray]:
        """What the image trunk puts out for the windows of a file that a part of it touches."""
        end = math.inf if part.end is None else part.end
        rows = self._base.execute(
            "SELECT outputs FROM windows JOIN files ON files.id = windows.file "
            "WHERE path = ? AND windows.start < ? AND windows.stop > ?",
            (path, end, part.start or 0.0),
        )
        return [np.frombuffer(outputs, np.float32) for (outputs,) in rows]

    def search(self, text: str, top: int = 10) -> list[Hit]:
        """The best windows for a sentence, by the model's own similarity."""
        return self.search_all([text], top)[0]

    def search_all(self, texts: Sequence[str], top: int = 10) -> list[list[Hit]]:
        """The best windows for each sentence.

        An index with at most CANDIDATES windows is compared in the order and tiles of an evaluation, so that the
        ranking equals an evaluation of these sentences for every variant of EMCL; but that the slots of absent frames,
        which an index does not keep, change the length of short videos' rows, and so the reference's scores a little.
        """
        self._written()
        queries = self.model.encode_queries(texts)
        if len(self) <= CANDIDATES:
            return self._ranked(queries, *self._everything(), top)
        hits = []
        for row in range(len(queries)):
            query = queries[row : row + 1]
            numbers = list(self._windows(self._vectors.nearest(self._vector(query), max(CANDIDATES, top))))
            hits += self._ranked(query, numbers, self.features(numbers), top)
        return hits

    def _everything(self) -> tuple[list[int], VideoFeatures]:
        """All window numbers and features, kept in memory; only for small indexes."""
        written = self._written()
        if self._all is None or self._all[0] != written:
            numbers = [number for (number,) in self._base.execute(_BY_PATH)]
            self._all = written, numbers, self.features(numbers)
        return self._all[1:]

    def _ranked(self, queries: TextFeatures, numbers: list[int], features: VideoFeatures, top: int) -> list[list[Hit]]:
        if not numbers:
            return [[] for _ in range(len(queries))]
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
        self._written()
        mean = video.mean()
        windows = self._windows(self._vectors.nearest(self._padded(normalize(mean, dim=-1)), max(CANDIDATES, top)))
        if not windows:
            return []
        means = normalize(self.features(list(windows)).mean(), dim=-1)
        best = (means @ normalize(mean, dim=-1)[0]).topk(min(top, len(windows)))
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

    def _vector(self, query: TextFeatures) -> torch.Tensor:
        """(1, D), or (1, D + K + 2): its products with the windows' vectors are cosines and ratios together."""
        unit = normalize(query.embeddings, dim=-1)
        if (counting := self.model.counting_factors()) is None:
            return self._padded(unit)
        factors, scale = counting
        return torch.cat([unit, query.factor_vectors(factors) / scale], 1)

    def _padded(self, unit: torch.Tensor) -> torch.Tensor:
        """With zeros for the numbers of the factors, so that only embeddings are compared."""
        return torch.nn.functional.pad(unit, (0, self._factor_width()))

    def _factor_width(self) -> int:
        factors = self.model.factors  # they are in the windows' vectors, whatever the task that will compare
        return len(factors.correlation) + 2 if factors is not None else 0

    def _write_vectors(self) -> None:
        width = int(self.model.model.backbone.embed_dim)
        self._vectors.write(len(self), width + self._factor_width(), self._rows(width))
        made_with = fingerprint_of(self.model.factors)
        with self._base:
            self._base.execute("DELETE FROM facts WHERE name = 'vectors'")
            self._base.execute("INSERT OR REPLACE INTO facts VALUES ('factors', ?)", (made_with,))

    def _rows(self, width: int, block: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of windows, and the vectors by which they are found."""
        factors = self.model.factors
        with closing(self._base.execute("SELECT id, frames, outputs FROM windows ORDER BY id")) as windows:
            while chunk := windows.fetchmany(block):
                means = np.stack([np.frombuffer(one, np.float32).reshape(-1, width).mean(0) for _, one, _ in chunk])
                rows = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
                if factors is not None:
                    outputs = np.stack([np.frombuffer(one, np.float32) for *_, one in chunk])
                    rows = np.concatenate([rows, factors.video_vectors(outputs)], 1)
                yield np.array([number for number, *_ in chunk], np.int64), rows.astype(np.float32)

    def features(self, numbers: Sequence[int]) -> VideoFeatures:
        """Windows' features, in the given order.

        Raises:
            KeyError: a number that is not in the index.
        """
        backbone, frames_per_video = self.model.model.backbone, self.model.config.data.frames
        frames = torch.zeros(len(numbers), frames_per_video, int(backbone.embed_dim))
        mask = torch.zeros(len(numbers), frames_per_video, dtype=torch.bool)
        outputs = torch.zeros(len(numbers), backbone.image.width)
        rows = self._base.execute(
            "SELECT id, frames, outputs FROM windows WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(numbers)),),
        )
        contents = {number: blobs for number, *blobs in rows}
        for row, number in enumerate(numbers):
            of_frames, of_trunk = (torch.frombuffer(bytearray(b), dtype=torch.float32) for b in contents[number])
            embeddings = of_frames.view(-1, frames.shape[-1])
            frames[row, : len(embeddings)], mask[row, : len(embeddings)] = embeddings, True
            outputs[row] = of_trunk
        return VideoFeatures(frames, mask, outputs)

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


def check_index(folder: Path) -> None:
    """Raises UserError if the folder has no index."""
    if not (folder / "clips.sqlite").is_file():
        raise UserError(f"{folder}: no index there; make one with `emcl index DIR --model RUN --out {folder}`")


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
