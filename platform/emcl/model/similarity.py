"""The similarity of texts and videos as EMCL-Net defines it, without materialising pooled rows.

Each text a pools the frames of each video b separately, p_ab = sum_t w_abt f_bt, EM runs over all A B pooled rows and
the A text rows, and the corrected rows are compared by their cosine. A direct implementation stores A B D numbers. But
pooled rows are only used in products, which follow from their T weights and from products of frames:

    p_ab . x   = sum_t w_abt (f_bt . x)                         (A, B, T) in place of (A, B, D)
    |L p_ab|^2 = w_ab^T [(L F_b) (L F_b)^T] w_ab                one (T, T) matrix a video, for any linear map L
    sum_ab p_ab p_ab^T = sum_b F_b^T [sum_a w_ab w_ab^T] F_b    the moments that EM needs

so the cost is that of T frames a video and not of A pooled rows. Texts are processed in blocks, each recomputed in the
backward pass, so that memory grows with A B and with the block.

Legend: A texts of this rank, B videos of all ranks, T frames, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emcl.distributed import ALONE, Ranks
from emcl.em import Correction, Moments
from emcl.model.pooling import frame_scores, pooling_weights
from emcl.model.regulariser import Regulariser, adjusted

BLOCK_NUMBERS = 2**22
"""Pooling weights of a block, by default: 16 MiB."""
LARGE_TILE = 512
"""Texts x videos at once where scores do not depend on the tile size."""
TILES_AT_ONCE = {"cuda": 64}
"""Of `similarity_by_tile`: EM's matrices of D = 512 take 64 MiB each."""
_EPSILON = 1e-12


def similarity(
    text_AD: Tensor,
    frames_BTD: Tensor,
    mask_BT: Tensor,
    *,
    temperature: float,
    regulariser: Regulariser | None = None,
    ranks: Ranks = ALONE,
    block: int | None = None,
    present_A: Tensor | None = None,
) -> Tensor:
    """Cosine of each text with each video as that text pools it, (A, B), in float32.

    A regulariser (EMCL) is fitted to the pooled rows and the text rows of all ranks, the corrected rows are compared,
    and it may adjust the cosines.

    Args:
        text_AD: this rank's texts.
        frames_BTD: all ranks' videos.
        mask_BT: which frames are present; a video without any gets 0.
        present_A: which of this rank's texts are present; nothing is fitted to the others. By default all.
        temperature: of the pooling's softmax.
        block: texts at once; as many as keep a block's pooling weights below `BLOCK_NUMBERS` where not given.
    """
    text_AD, frames_BTD = text_AD.float(), frames_BTD.float()
    size = block or max(1, BLOCK_NUMBERS // max(1, mask_BT.numel()))
    correction = None
    if regulariser is not None:
        directions = regulariser.fits_directions
        correction = regulariser.correction(
            lambda: _measure(directions, text_AD, frames_BTD, mask_BT, present_A, temperature, size),
            all_reduce=ranks.sum,
        )
    videos = _Videos.of(frames_BTD, mask_BT, correction)
    texts = list(text_AD.split(size))
    if len(texts) == 1 or not torch.is_grad_enabled():
        strips = [_cosine(text, videos, correction, temperature) for text in texts]
    else:
        strips = [
            checkpoint(_cosine, text, videos, correction, temperature, use_reentrant=False, preserve_rng_state=False)
            for text in texts
        ]
    return adjusted(regulariser, torch.cat(strips), text_AD, frames_BTD, mask_BT)


@torch.no_grad()
def similarity_by_tile(
    text_AD: Tensor,
    frames_GTD: Tensor,
    mask_GT: Tensor,
    tile: int,
    *,
    temperature: float,
    regulariser: Regulariser | None = None,
    at_once: int | None = None,
) -> Tensor:
    """The texts with each tile of so many videos, independently, side by side: (A, G).

    The reference's EM, fitted anew in each tile, is hundreds of small operators, whose launches cost a GPU more than
    their work: on GPUs many tiles are processed at once. On CPUs that would not be faster.

    Args:
        at_once: number of tiles; by default as many as `TILES_AT_ONCE` of the device and `BLOCK_NUMBERS` allow.
    """
    if at_once is None:
        fitting = BLOCK_NUMBERS // max(1, len(text_AD) * tile * frames_GTD.shape[1])
        at_once = max(1, min(TILES_AT_ONCE.get(text_AD.device.type, 1), fitting))
    if regulariser is not None and (regulariser.training or not regulariser.batched):  # each tile updates its state
        at_once = 1

    def of(frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return similarity(text_AD, frames_BTD, mask_BT, temperature=temperature, regulariser=regulariser)

    whole = len(frames_GTD) // tile * tile
    if at_once == 1 or whole <= tile:
        return torch.cat([of(*videos) for videos in zip(frames_GTD.split(tile), mask_GT.split(tile), strict=True)], 1)
    tiles = (frames_GTD[:whole].unflatten(0, (-1, tile)), mask_GT[:whole].unflatten(0, (-1, tile)))
    scores = torch.func.vmap(of, chunk_size=at_once)(*tiles).transpose(0, 1).flatten(1)  # (A, whole)
    return scores if whole == len(frames_GTD) else torch.cat([scores, of(frames_GTD[whole:], mask_GT[whole:])], 1)


@torch.no_grad()
def similarity_on_ranks(
    text_QD: Tensor,
    frames_GTD: Tensor,
    mask_GT: Tensor,
    tile: int,
    ranks: Ranks,
    *,
    temperature: float,
    regulariser: Regulariser | None = None,
) -> NDArray[np.float32]:
    """An evaluation's (Q, G) on rank 0 and (0, G) elsewhere, from tiles of texts x videos, whose rows the ranks share.

    A transductive regulariser (the reference EMCL) sees one tile of `tile` x `tile` at a time, whichever rank computes
    it, and its scores depend on that; otherwise the tile size does not change the scores, and large tiles are used.
    """
    if regulariser is None or not regulariser.transductive:
        tile = LARGE_TILE
    own: dict[int, NDArray[np.float32]] = {}
    for first in range(0, len(text_QD), tile)[ranks.rank :: ranks.world_size]:
        texts_AD = text_QD[first : first + tile]
        strip_AG = similarity_by_tile(
            texts_AD, frames_GTD, mask_GT, tile, temperature=temperature, regulariser=regulariser
        )
        own[first] = strip_AG.float().cpu().numpy()  # one host synchronisation a strip
    everyone = ranks.collect_objects(own)
    if everyone is None:
        return np.empty((0, len(frames_GTD)), np.float32)
    scores_QG = np.empty((len(text_QD), len(frames_GTD)), np.float32)
    for strips in everyone:
        for first, rows in strips.items():
            scores_QG[first : first + tile] = rows
    return scores_QG


@dataclass
class _Videos:
    """What all texts share of the videos: their frames, the frames after the correction, and products of those."""

    frames: Tensor  # (B, T, D)
    mask: Tensor  # (B, T)
    products: Tensor  # (B, T, T), F F^T
    shifts: Tensor | None = None  # beta P f, (B, T, D); detached where the reconstruction is a constant
    cross: Tensor | None = None  # F shifts^T, (B, T, T)
    shift_products: Tensor | None = None  # shifts shifts^T, (B, T, T)

    @staticmethod
    def of(frames: Tensor, mask: Tensor, correction: Correction | None) -> _Videos:
        products = frames @ frames.transpose(1, 2)
        if correction is None:
            return _Videos(frames, mask, products)
        seen = frames.detach() if correction.constant else frames
        shifts = correction.beta * (((seen @ correction.bases) * correction.weights) @ correction.bases.T)
        across = shifts.transpose(1, 2)
        return _Videos(frames, mask, products, shifts, frames @ across, shifts @ across)


def _cosine(text_AD: Tensor, videos: _Videos, correction: Correction | None, temperature: float) -> Tensor:
    scores_ABT = frame_scores(text_AD, videos.frames)
    weights_ABT = pooling_weights(scores_ABT, videos.mask, temperature)
    if correction is None:
        dot_AB = (weights_ABT * scores_ABT).sum(-1)
        return _normalised(dot_AB, text_AD, _quadratic(weights_ABT, videos.products, weights_ABT))
    assert videos.shifts is not None and videos.cross is not None and videos.shift_products is not None
    text_AD = correction(text_AD)
    fixed_ABT = weights_ABT.detach() if correction.constant else weights_ABT
    dot_AB = (
        weights_ABT * frame_scores(text_AD, videos.frames) + fixed_ABT * frame_scores(text_AD, videos.shifts)
    ).sum(-1)
    length_AB = _quadratic(weights_ABT, videos.products, weights_ABT)  # |p|^2
    square_AB = (
        length_AB
        + 2 * _quadratic(weights_ABT, videos.cross, fixed_ABT)
        + _quadratic(fixed_ABT, videos.shift_products, fixed_ABT)
    )
    if correction.offset is not None:  # ... - beta |p| c
        offset = correction.beta * correction.offset
        norm_AB = length_AB.clamp_min(_EPSILON).sqrt()
        moved_BT = (videos.frames + videos.shifts) @ offset
        square_AB = square_AB - 2 * norm_AB * (weights_ABT * moved_BT).sum(-1) + length_AB * offset.square().sum()
        dot_AB = dot_AB - norm_AB * (text_AD @ offset)[:, None]
    return _normalised(dot_AB, text_AD, square_AB)


def _normalised(dot_AB: Tensor, text_AD: Tensor, square_AB: Tensor) -> Tensor:
    scale_AB = square_AB.clamp_min(_EPSILON).sqrt() * text_AD.norm(dim=-1).clamp_min(_EPSILON)[:, None]
    return dot_AB / scale_AB


def _quadratic(left_ABT: Tensor, matrix_BTT: Tensor, right_ABT: Tensor) -> Tensor:
    """left_ab^T matrix_b right_ab: (A, B)."""
    return (torch.einsum("abt,bts->abs", left_ABT, matrix_BTT) * right_ABT).sum(-1)


@torch.no_grad()
def _measure(
    directions: bool,
    text_AD: Tensor,
    frames_BTD: Tensor,
    mask_BT: Tensor,
    present_A: Tensor | None,
    temperature: float,
    size: int,
) -> list[Moments]:
    """Moments of this rank's A B pooled rows and A text rows, together or of the directions of each."""
    batch, frames = mask_BT.shape
    here_A = text_AD.new_ones(len(text_AD)) if present_A is None else present_A.to(text_AD.dtype)
    here_B = mask_BT.any(1).to(text_AD.dtype)
    text_AD = text_AD * here_A[:, None]
    products_BTT = frames_BTD @ frames_BTD.transpose(1, 2) if directions else None
    second_BTT = frames_BTD.new_zeros(batch, frames, frames)
    first_BT = frames_BTD.new_zeros(batch, frames)
    count = frames_BTD.new_zeros(()) if directions else here_A.sum() * here_B.sum()
    for text, here in zip(text_AD.split(size), here_A.split(size), strict=True):
        weights_ABT = pooling_weights(frame_scores(text, frames_BTD), mask_BT, temperature) * here[:, None, None]
        if products_BTT is not None:
            length_AB = _quadratic(weights_ABT, products_BTT, weights_ABT)
            valid_AB = (length_AB > _EPSILON) & length_AB.isfinite()
            weights_ABT = torch.where(
                valid_AB[..., None], weights_ABT * length_AB.clamp_min(_EPSILON).rsqrt()[..., None], 0
            )
            count += valid_AB.sum()
        second_BTT += torch.einsum("abt,abs->bts", weights_ABT, weights_ABT)
        first_BT += weights_ABT.sum(0)
    flat = frames_BTD.flatten(0, 1)  # (B T, D)
    pooled = Moments(
        gram=flat.T @ (second_BTT @ frames_BTD).flatten(0, 1), total=first_BT.flatten() @ flat, count=count
    )
    if directions:
        return [pooled, Moments.of_directions(text_AD)]
    texts = Moments.of(text_AD)
    return [pooled + Moments(gram=texts.gram, total=texts.total, count=here_A.sum())]
