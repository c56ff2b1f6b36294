"""The compact variant keeps the paper's promise: distinct bases, no fading, one query embedded as among many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import shared
from emcl.distributed import Ranks
from emcl.em import EMCL, Moments, fit_compact
from ranks import run_on_ranks

D = 512


def random_rows(rows: int, seed: int = 0) -> torch.Tensor:
    """Random features with a common mean, as CLIP's have one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator) + 0.5 * torch.randn(D, generator=generator)


def trained_rows(rows: int, seed: int = 0) -> torch.Tensor:
    """Rows with the geometry of a trained model: factors of its similarity on MSR-VTT, drawn with a little noise."""
    matrix = torch.from_numpy(np.load(shared("data/similarity/cap4video_msrvtt_1ka.npy"))).float()
    left, values, right = torch.linalg.svd(matrix)
    both = torch.cat([left[:, :D] * values[:D].sqrt(), right.T[:, :D] * values[:D].sqrt()])  # (2000, D)
    generator = torch.Generator().manual_seed(seed)
    drawn = both[torch.randint(len(both), (rows,), generator=generator)]
    return drawn + 0.1 * both.std() * torch.randn(rows, D, generator=generator)


SOURCES = {"random": random_rows, "trained": trained_rows}


def fitted(rows: torch.Tensor, bases: int = 32, **settings: float) -> EMCL:
    return EMCL(variant="compact", bases=bases, beta=1.0, **settings).fit(rows).eval()  # type: ignore[arg-type]


def effective_rank(matrix: torch.Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    share = values / values.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(("rows", "bases"), [(64, 8), (128, 32), (1024, 64), (16512, 32), (65536, 64)])
def test_bases_are_distinct(source: str, rows: int, bases: int, scale: float) -> None:
    x = scale * SOURCES[source](rows)
    (corrected,) = EMCL(variant="compact", bases=bases, beta=1.0)(x)  # in training, on its first batch
    assert effective_rank(corrected - x) >= 0.8 * bases
    layer = fitted(x, bases)
    assert effective_rank(layer.transform(x) - x) >= 0.8 * bases
    cosines = torch.nn.functional.normalize(layer.start, dim=0)
    cosines = cosines.T @ cosines - torch.eye(bases)
    assert cosines.abs().max() < 0.01


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("factor", [0.1, 3.0, 100.0])
def test_the_output_scales_with_the_input(source: str, factor: float) -> None:
    x = SOURCES[source](500)
    (plain,) = EMCL(variant="compact")(x)
    (scaled,) = EMCL(variant="compact")(factor * x)
    assert (scaled / factor - plain).norm() / plain.norm() < 1e-4
    layer = fitted(x)
    torch.testing.assert_close(layer.transform(factor * x) / factor, layer.transform(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_the_correction_does_not_fade_with_the_number_of_rows(source: str) -> None:
    sizes = []
    for rows in (128, 1024, 16512):
        x = SOURCES[source](rows)
        (corrected,) = EMCL(variant="compact", beta=1.0)(x)
        sizes.append(float((corrected - x).norm() / x.norm()))
    assert max(sizes) / min(sizes) < 1.05, sizes


@pytest.mark.parametrize("source", SOURCES)
def test_one_query_alone_gets_the_embedding_that_it_gets_among_others(source: str) -> None:
    layer = fitted(SOURCES[source](2000))
    x = torch.nn.functional.normalize(SOURCES[source](3000, seed=1), dim=-1)
    together = layer.transform(x)
    for row in range(0, 3000, 500):
        assert (layer.transform(x[row : row + 1]) - together[row]).abs().max() < 1e-6
    layer(x)  # a forward pass in evaluation leaves the bases as they are
    torch.testing.assert_close(layer.transform(x), together, rtol=0, atol=0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rows", [64, 1000, 20000])
def test_no_iteration_raises_the_reconstruction_error(source: str, rows: int) -> None:
    moments = Moments.of_directions(SOURCES[source](rows))
    mean = moments.total / moments.count
    covariance = moments.gram / moments.count - torch.outer(mean, mean)
    start = torch.linalg.qr(torch.randn(D, 32, generator=torch.Generator().manual_seed(0)))[0]
    bases, variance, objective = fit_compact(covariance, start, iterations=30)
    errors = torch.stack(objective)
    assert (errors[1:] <= errors[:-1] + 1e-6).all()
    assert errors[-1] < errors[0]
    # it is the objective that it says: of rows and their codes, not of moments
    unit = torch.nn.functional.normalize(SOURCES[source](rows), dim=-1) - mean
    direct = (unit - unit @ bases @ bases.T).square().sum(1).mean()
    assert float(direct) == pytest.approx(float(errors[-1]), rel=1e-3, abs=1e-5)
    assert (variance[:-1] >= variance[1:] - 1e-7).all()


def test_em_finds_the_directions_that_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.linalg.qr(torch.randn(D, 8, generator=generator))[0]
    x = torch.randn(4000, 8, generator=generator) @ truth.T + 0.01 * torch.randn(4000, D, generator=generator)
    bases = fitted(x, 8).start
    assert torch.linalg.svdvals(truth.T @ bases).min() > 0.999


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_fewer_rows_than_bases(rows: int) -> None:
    x = random_rows(rows)
    (corrected,) = EMCL(variant="compact", width=D)(x)
    assert corrected.shape == x.shape
    assert corrected.isfinite().all()
    if rows <= 1:  # one row has no direction but its mean
        torch.testing.assert_close(corrected, x)


def test_rows_of_zeros_stay_zero_and_do_not_count() -> None:
    x = random_rows(200)
    padded = torch.cat([x, torch.zeros(100, D)])
    corrected = fitted(padded).transform(padded)
    torch.testing.assert_close(corrected[200:], torch.zeros(100, D))
    torch.testing.assert_close(corrected[:200], fitted(x).transform(x), rtol=1e-4, atol=1e-4)
    assert (fitted(torch.zeros(10, D)).transform(x) == x).all()


def test_a_row_that_is_not_a_number_harms_no_other() -> None:
    x = random_rows(200)
    bad = x.clone()
    bad[7] = float("nan")
    bad[9, 3] = float("inf")
    layer = fitted(bad)
    keep = [row for row in range(200) if row not in (7, 9)]
    corrected = layer.transform(bad)
    assert corrected[keep].isfinite().all()
    assert not corrected[7].isfinite().any()
    torch.testing.assert_close(corrected[keep], fitted(x[keep]).transform(x[keep]), rtol=1e-4, atol=1e-4)


def test_repeated_rows_change_nothing() -> None:
    x = random_rows(200)
    once, thrice = fitted(x), fitted(x.repeat(3, 1))
    torch.testing.assert_close(once.transform(x), thrice.transform(x), rtol=1e-3, atol=1e-3)
    same = fitted(x[:1].repeat(50, 1))
    torch.testing.assert_close(same.transform(x), x)  # one direction alone varies in nothing


def test_modalities_count_alike_whatever_their_numbers_of_rows() -> None:
    video, text = random_rows(600, seed=1), random_rows(300, seed=2)
    few = EMCL(variant="compact").fit(video, text)
    many = EMCL(variant="compact").fit(video.repeat(20, 1), text)
    torch.testing.assert_close(few.transform(text), many.transform(text), rtol=1e-3, atol=1e-3)


def _own_rows(ranks: Ranks, x: torch.Tensor, bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    layer = EMCL(variant="compact", bases=8)
    for _ in range(2):  # the state of the first step enters the second
        (corrected,) = layer(x[bounds[ranks.rank] : bounds[ranks.rank + 1]], all_reduce=ranks.sum)
    return corrected, layer.start


@pytest.mark.parametrize("bounds", [[0, 40, 97], [0, 1, 60, 97], [0, 20, 20, 80, 97]])
def test_ranks_with_unequal_rows_get_what_one_process_gets(bounds: list[int], tmp_path: Path) -> None:
    x = torch.nn.functional.normalize(random_rows(97)[:, :64], dim=-1)
    ((whole, _),) = run_on_ranks(_own_rows, 1, tmp_path, x, [0, 97])
    results = run_on_ranks(_own_rows, len(bounds) - 1, tmp_path, x, bounds)
    torch.testing.assert_close(torch.cat([corrected for corrected, _ in results]), whole, atol=1e-5, rtol=0)
    for _, bases in results:
        assert torch.equal(bases, results[0][1])  # the same bits on every rank


def test_gradients_are_those_of_the_map() -> None:
    layer = fitted(random_rows(300)[:, :16].contiguous(), 4).double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: layer(rows)[0], x, atol=1e-3, eps=1e-3)  # the map itself is float32


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_fit_transform_save_and_load(kind: str, tmp_path: Path) -> None:
    video, text = random_rows(300, seed=1), random_rows(200, seed=2)
    given = (video, text) if kind == "torch" else (video.numpy(), text.numpy())
    layer = EMCL(variant="compact", bases=16, balance=1.0).fit(*given)
    corrected = layer.transform(given[0])
    assert type(corrected) is type(given[0])
    layer.save(tmp_path / "bases.pt")
    again = EMCL.load(tmp_path / "bases.pt").transform(given[0])
    np.testing.assert_array_equal(np.asarray(again), np.asarray(corrected))


def test_the_state_is_in_the_state_dict_and_survives_casts() -> None:
    layer = EMCL(variant="compact", bases=8)
    layer(random_rows(100), random_rows(50, seed=1))
    assert set(layer.state_dict()) == {"start", "gram", "total", "count"}
    other = EMCL(variant="compact", bases=8).bfloat16()
    other.load_state_dict(layer.state_dict())
    assert other.start.dtype == torch.float32
    x = random_rows(10)
    torch.testing.assert_close(other.eval()(x)[0], layer.eval()(x)[0], rtol=0, atol=0)


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(ValueError, match="as many bases"):
        EMCL(variant="compact", bases=32, width=16)
    with pytest.raises(RuntimeError, match="call fit"):
        EMCL(variant="compact").transform(random_rows(3))
    with pytest.raises(ValueError, match="width"):
        fitted(random_rows(50)).transform(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="reference variant"):
        EMCL().fit(random_rows(5))
