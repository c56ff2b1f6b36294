"""The nearest neighbours of a query among an index's vectors, in a FAISS index on disk.

Up to EXACT windows the search is exact; above, it uses 8-bit quantised vectors, a quarter of the memory and of the
bytes that a search reads. The quantisation error matters little, because the 1,000 nearest are re-ranked with the
exact embeddings (benchmarks/index_speed.py measures this on random vectors, the hardest case, where graph and
inverted-file indexes lose most neighbours).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emcl.errors import UserError

EXACT = 200_000
"""Largest number of windows with exact nearest-neighbour search."""
STEP = 16
"""Vectors are filled up with zeros to a multiple of it: FAISS compares 8-bit numbers by SIMD where their width is a
multiple of 8, which is eight times as fast (64 ms for 100,000 vectors of 642 numbers, 8 ms of 656)."""


class Vectors:
    """`vectors.faiss` of an index's folder, memory-mapped. Reading is thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "vectors.faiss"
        self._opened: tuple[int, Any] | None = None

    def nearest(self, query: torch.Tensor, count: int) -> list[int]:
        """The numbers of the windows whose vectors have the largest products with that of a query, (1, E).

        Raises:
            UserError: there are no vectors, or those of other factors.
        """
        written = self.written()
        if self._opened is None or self._opened[0] != written:
            faiss = faiss_package()
            self._opened = written, faiss.read_index(str(self.path), faiss.IO_FLAG_MMAP_IFC)
        vectors = self._opened[1]
        wanted = filled(query.numpy().astype(np.float32))
        if vectors.d != wanted.shape[1]:
            raise UserError(f"{self.folder}: the index changes, or was not finished; run `emcl index` again")
        _, numbers = vectors.search(wanted, min(count, max(1, vectors.ntotal)))
        return [int(number) for number in numbers[0] if number >= 0]

    def written(self) -> int:
        """Modification time: `emcl index` may update them while they are searched.

        Raises:
            UserError: there are no vectors.
        """
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            raise UserError(f"{self.folder}: the index was not finished; run `emcl index` again") from None

    def write(self, count: int, width: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes numbers and vectors (n, `width`) of all windows to a temporary file, then renames it."""
        vectors = vectors_for(count, width)
        for first, (numbers, rows) in enumerate(blocks):
            if first == 0:
                vectors.train(filled(rows))
            vectors.add_with_ids(filled(rows), numbers)
        temporary = self.folder / ".vectors.part"
        faiss_package().write_index(vectors, str(temporary))
        temporary.replace(self.path)
        self._opened = None


def vectors_for(count: int, width: int) -> Any:
    """An empty FAISS index for `count` vectors of `width` numbers, to be added `filled` with their window numbers."""
    width += -width % STEP
    faiss = faiss_package()
    if count <= EXACT:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    kind = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexIDMap2(faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT))


def filled(rows: np.ndarray) -> np.ndarray:
    """(n, E) with zeros up to a multiple of STEP."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % STEP)))


def faiss_package() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("the index wants FAISS: pip install -e '.[search]' (or faiss-cpu)") from None
    return faiss
