"""The similarity that never holds a pooled row equals the one written as its formulas stand, gradients too."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from emcl.model.emcl_layer import EMCLLayer
from emcl.model.similarity import similarity, similarity_by_tile
from straightforward import cosines, pooled_rows, reference_similarity

A, B, T, D = 7, 9, 5, 32
TEMPERATURE = 3.0


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(A, D, generator=generator)
    frames = torch.randn(B, T, D, generator=generator) + 0.5
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2, 3:] = False
    return text.requires_grad_(), frames.requires_grad_(), mask


def layer(variant: str) -> EMCLLayer:
    emcl = EMCLLayer(variant=variant, bases=6, width=D, beta=1.5)
    if variant == "reference":
        emcl.mu.copy_(torch.linspace(-1, 1, 6))
    return emcl


def plainly(text: torch.Tensor, frames: torch.Tensor, mask: torch.Tensor, emcl: EMCLLayer | None) -> torch.Tensor:
    if emcl is not None and emcl.variant == "reference":
        return reference_similarity(text, frames, mask, emcl.mu, temperature=TEMPERATURE, beta=emcl.beta)
    pooled = pooled_rows(text, frames, mask, TEMPERATURE)
    return cosines(pooled, text) if emcl is None else cosines(*emcl(pooled, text))


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("variant", [None, "reference", "compact"])
def test_values_and_gradients_equal_the_formulas(variant: str | None, block: int | None) -> None:
    upstream = torch.randn(A, B, generator=torch.Generator().manual_seed(1))
    results = []
    for compute in (plainly, similarity):
        text, frames, mask = inputs()
        emcl = layer(variant) if variant else None
        if compute is plainly:
            scores = plainly(text, frames, mask, emcl)
        else:
            scores = similarity(text, frames, mask, temperature=TEMPERATURE, regulariser=emcl, block=block)
        (scores * upstream).sum().backward()
        results.append((scores.detach(), text.grad, frames.grad))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [None, "reference", "compact"])
def test_a_video_without_frames_scores_nothing_and_has_no_nan(variant: str | None) -> None:
    text, frames, mask = inputs()
    mask[4] = False
    scores = similarity(text, frames, mask, temperature=TEMPERATURE, regulariser=layer(variant) if variant else None)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert text.grad is not None and text.grad.isfinite().all()
    assert frames.grad is not None and frames.grad.isfinite().all()
    if variant is None:
        assert (scores[:, 4] == 0).all()


def test_the_largest_tensor_grows_with_frames_and_not_with_the_width() -> None:
    """Saved for the backward pass: nothing of A x B x D."""
    text = torch.randn(128, 256, requires_grad=True)
    frames = torch.randn(128, 4, 256, requires_grad=True)
    mask = torch.ones(128, 4, dtype=torch.bool)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        similarity(text, frames, mask, temperature=TEMPERATURE, regulariser=EMCLLayer()).sum().backward()
    assert max(saved) <= max(frames.numel(), 128 * 128 * 4) < 128 * 128 * 256 / 10


@pytest.mark.parametrize("variant", [None, "reference", "compact"])
@pytest.mark.parametrize("videos", [B, 8, 4, 2])
def test_tiles_at_once_are_those_one_after_another(variant: str | None, videos: int) -> None:
    text, frames, mask = inputs()
    frames, mask = frames[:videos], mask[:videos]
    emcl = None if variant is None else layer(variant)
    if emcl is not None:
        if variant == "compact":
            emcl(frames, text)
        emcl.eval()
    one_by_one = [similarity_by_tile(text, frames, mask, 4, temperature=TEMPERATURE, regulariser=emcl, at_once=1)]
    for first in range(0, videos, 4):
        tile = slice(first, first + 4)
        alone = similarity(text, frames[tile], mask[tile], temperature=TEMPERATURE, regulariser=emcl)
        torch.testing.assert_close(one_by_one[0][:, tile], alone, rtol=0, atol=0)
    for at_once in (2, 64):
        scores = similarity_by_tile(text, frames, mask, 4, temperature=TEMPERATURE, regulariser=emcl, at_once=at_once)
        torch.testing.assert_close(scores, one_by_one[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("numbers", "chunk"), [(2**22, 64), (3 * A * 2 * T, 3), (A * 2 * T - 1, None)])
def test_a_gpu_takes_as_many_tiles_at_once_as_fit_a_block(
    numbers: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, frames, mask = inputs()
    one_by_one = similarity_by_tile(text, frames, mask, 2, temperature=TEMPERATURE)
    monkeypatch.setattr("emcl.model.similarity.TILES_AT_ONCE", {"cpu": 64})
    monkeypatch.setattr("emcl.model.similarity.BLOCK_NUMBERS", numbers)
    with mock.patch.object(torch.func, "vmap", wraps=torch.func.vmap) as vmap:
        scores = similarity_by_tile(text, frames, mask, 2, temperature=TEMPERATURE)
    assert [call.kwargs["chunk_size"] for call in vmap.call_args_list] == ([] if chunk is None else [chunk])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-5, atol=1e-6)


def test_a_layer_in_training_sees_one_tile_after_another() -> None:
    text, frames, mask = inputs()
    moved = []
    for at_once in (1, 64):
        emcl = layer("reference").train()
        similarity_by_tile(text, frames, mask, 4, temperature=TEMPERATURE, regulariser=emcl, at_once=at_once)
        moved.append(emcl.mu)
    assert torch.equal(*moved) and not torch.equal(moved[0], layer("reference").mu)
