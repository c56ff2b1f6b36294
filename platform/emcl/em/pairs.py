"""What EM needs to know of pairs of videos and sentences: sums over their directions, in blocks and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import AllReduce, gram_of

TEXTS_AT_ONCE = 16_384
"""Made directions of at once, in float64."""
_ROUNDING = 1e-12
"""A difference to the mean below this share of the numbers that it was taken of is rounding."""


class Block(NamedTuple):
    """Some videos and their sentences, of any number each."""

    video: Tensor  # (n, D_v)
    text: Tensor  # (m, D_t)
    owner: Tensor  # (m,) each sentence's video: its row in this block
    group: Tensor  # (n,) whole numbers, consecutive or hashes: videos of one group are not divided between folds

    def checked(self) -> Block:
        """The same, with whole numbers as int64.

        Raises:
            ValueError: shapes or owners that do not fit.
        """
        if any(rows.ndim != 2 or not rows.shape[1] for rows in (self.video, self.text)):
            shapes = f"{tuple(self.video.shape)} and {tuple(self.text.shape)}"
            raise ValueError(f"features are (videos, D_v) and (texts, D_t), not {shapes}")
        for name, numbers, rows in (("owner", self.owner, self.text), ("group", self.group, self.video)):
            whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
            if numbers.shape != rows.shape[:1] or (len(rows) and not whole):
                raise ValueError(f"`{name}` is {len(rows)} whole numbers, not {numbers.dtype} {tuple(numbers.shape)}")
        owner = self.owner.long()
        if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < len(self.video):
            raise ValueError(f"an owner is a row of the {len(self.video)} videos, from 0")
        return Block(self.video, self.text, owner, self.group.long())

    @staticmethod
    def join(blocks: Sequence[Block]) -> Block:
        """One after the other; at least one."""
        firsts = accumulate((len(block.video) for block in blocks[:-1]), initial=0)
        owners = [block.owner + first for block, first in zip(blocks, firsts, strict=True)]
        video, text, _, group = (torch.cat(rows) for rows in zip(*blocks, strict=True))
        return Block(video, text, torch.cat(owners), group)

    def split(self, videos: int) -> Iterator[Block]:
        """Blocks of at most so many videos, each with its sentences."""
        if len(self.video) <= videos:
            yield self
            return
        order_M = self.owner.argsort(stable=True)
        ends = self.owner.bincount(minlength=len(self.video)).cumsum(0)
        for first in range(0, len(self.video), videos):
            last = min(first + videos, len(self.video))
            here = order_M[ends[first - 1] if first else 0 : ends[last - 1]]
            yield Block(self.video[first:last], self.text[here], self.owner[here] - first, self.group[first:last])

    def of_fold(self, fold: int, folds: int) -> Block:
        """The videos of one fold, and their sentences."""
        here_N = self.group.remainder(folds) == fold
        new_N = here_N.cumsum(0) - 1  # rows in the new block
        here_M = here_N[self.owner]
        return Block(self.video[here_N], self.text[here_M], new_N[self.owner[here_M]], self.group[here_N])


Blocks = Callable[[], Iterable[Block]]
"""Called once for each pass over the rows; at least one block, of no rows where there are none."""


class Means(NamedTuple):
    """One row of each modality: of the features, or of their directions."""

    video: Tensor  # (D_v,)
    text: Tensor  # (D_t,)


class Covariances(NamedTuple):
    """Mean products of directions, of which the same row of each modality was subtracted."""

    video: Tensor  # (D_v, D_v) over videos
    text: Tensor  # (D_t, D_t) over sentences
    cross: Tensor  # (D_t, D_v) over pairs of a video and the mean of its sentences


def directions(rows: Tensor, mean: Tensor) -> Tensor:
    """(x - mean) / |x - mean| of rows (..., D), in float64.

    Zeros for a row of zeros, which is an absent one, and for the mean itself. One that is not finite holds NaN.
    """
    if not rows.is_floating_point():
        rows = rows.double()
    off = rows - mean
    size, largest = _largest(rows).double(), _largest(off)
    absent = (size == 0) | (largest <= _ROUNDING * torch.maximum(size, mean.abs().amax()))
    if rows.dtype == torch.float64:  # squares of its numbers may leave its range, those of others' do not
        off = off / largest.where(~absent, 1.0)
    norm = torch.linalg.vector_norm(off, dim=-1, keepdim=True)
    factor = (1 / norm.where(~absent, 1.0)).where(~absent, 0.0)
    return off * factor


@dataclass(frozen=True, kw_only=True)
class PairMoments:
    """Sums of products of directions, each with a 1 at its end, so that sums and counts are in the last row and column.

    Absent rows are zeros, and have a 0 there.
    """

    video: Tensor  # (D_v + 1, D_v + 1) over videos
    text: Tensor  # (D_t + 1, D_t + 1) over sentences
    cross: Tensor  # (D_t + 1, D_v + 1) over pairs of a video and the mean of its sentences

    @staticmethod
    def of(video_ND: Tensor, text_MD: Tensor, owner_M: Tensor, means: Means) -> PairMoments:
        """Of features. Those that are zero, not finite, or equal to the mean have no direction and do not count."""
        video_NE = _with_ones(video_ND, means.video)
        text_EE = means.text.new_zeros(len(means.text) + 1, len(means.text) + 1)
        text_NE = means.text.new_zeros(len(video_ND), len(means.text) + 1)  # sums over the sentences of a video
        for rows_MD, owners_M in zip(text_MD.split(TEXTS_AT_ONCE), owner_M.split(TEXTS_AT_ONCE), strict=True):
            rows_ME = _with_ones(rows_MD, means.text)
            text_EE += gram_of(rows_ME)
            text_NE.index_add_(0, owners_M, rows_ME)
        text_NE = text_NE / text_NE[:, -1:].clamp_min(1)  # their means
        cross_EE = text_NE.T @ (video_NE * text_NE[:, -1:])
        return PairMoments(video=gram_of(video_NE), text=text_EE, cross=cross_EE)

    @staticmethod
    def sum(moments: Sequence[PairMoments], all_reduce: AllReduce | None) -> list[PairMoments]:
        """Sums each of `moments` over all ranks, in one message."""
        if all_reduce is None:
            return list(moments)
        shapes = [matrix.shape for one in moments for matrix in one.matrices]
        packed = all_reduce(torch.cat([matrix.flatten() for one in moments for matrix in one.matrices]))
        matrices = [
            numbers.view(shape)
            for numbers, shape in zip(packed.split([shape.numel() for shape in shapes]), shapes, strict=True)
        ]
        return [
            PairMoments(video=video, text=text, cross=cross)
            for video, text, cross in zip(matrices[::3], matrices[1::3], matrices[2::3], strict=True)
        ]

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.video, self.text, self.cross

    def __add__(self, other: PairMoments) -> PairMoments:
        return PairMoments(video=self.video + other.video, text=self.text + other.text, cross=self.cross + other.cross)

    def __sub__(self, other: PairMoments) -> PairMoments:
        return PairMoments(video=self.video - other.video, text=self.text - other.text, cross=self.cross - other.cross)

    @property
    def means(self) -> Means:
        """The mean directions of all videos and of all sentences."""
        return Means(_mean(self.video)[-1, :-1], _mean(self.text)[-1, :-1])

    def covariances(self, around: Means) -> Covariances:
        """Around these rows, which need not be the means of these very pairs."""
        return Covariances(
            _around(self.video, around.video, around.video),
            _around(self.text, around.text, around.text),
            _around(self.cross, around.text, around.video),
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many videos, sentences, and videos with a sentence there are."""
        return {
            name: round(float(m[-1, -1])) for name, m in zip(("videos", "texts", "pairs"), self.matrices, strict=True)
        }


def mean_rows(blocks: Iterable[Block], all_reduce: AllReduce | None) -> Means:
    """Mean video and mean sentence of all that are present, on all ranks together, in one message."""
    total: tuple[Tensor, Tensor] | None = None
    for block in blocks:
        sums = _sum_and_count(block.video), _sum_and_count(block.text)
        total = sums if total is None else (total[0] + sums[0], total[1] + sums[1])
    if total is None:
        raise ValueError("no block: without videos give a block of no rows, which tells their widths")
    packed = torch.cat(total)
    packed = packed if all_reduce is None else all_reduce(packed)
    video, text = packed.split([len(part) for part in total])
    return Means(video[:-1] / video[-1].clamp_min(1), text[:-1] / text[-1].clamp_min(1))


def _sum_and_count(rows: Tensor) -> Tensor:
    """(D + 1,) of the rows that are present and finite."""
    total = rows.new_zeros(rows.shape[1] + 1, dtype=torch.float64)
    for part in rows.split(TEXTS_AT_ONCE):
        largest = _largest(part if part.is_floating_point() else part.double())[:, 0]
        if not largest.isfinite().all():
            part = part[largest.isfinite()]
        total[:-1] += part.sum(0, dtype=torch.float64)
        total[-1] += ((largest > 0) & largest.isfinite()).sum()
    return total


def _with_ones(rows: Tensor, mean: Tensor) -> Tensor:
    """Directions (N, D + 1) with a 1 at the end; zeros where there is none."""
    unit = directions(rows, mean)
    if not unit.isfinite().all():
        unit = unit.nan_to_num(0.0)
    return torch.cat([unit, (_largest(unit) > 0).double()], 1)


def _largest(rows: Tensor) -> Tensor:
    """(..., 1) the largest number of each row, without its sign."""
    return torch.linalg.vector_norm(rows, ord=torch.inf, dim=-1, keepdim=True)


def _mean(sums: Tensor) -> Tensor:
    return sums / sums[-1, -1].clamp_min(1)


def _around(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Mean of (x - left) (y - right)^T from the sums of [x, 1] [y, 1]^T."""
    mean = _mean(sums)
    x, y, here = mean[:-1, -1], mean[-1, :-1], mean[-1, -1]
    return mean[:-1, :-1] - torch.outer(left, y) - torch.outer(x, right) + here * torch.outer(left, right)
