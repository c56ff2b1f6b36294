"""The decomposition equals the published reference, and its layer behaves in someone else's training loop."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, shared
from emcl.distributed import Ranks
from emcl.em import EMCL, Moments
from emcl.model.emcl_layer import EMCLLayer
from emcl.model.similarity import similarity
from ranks import run_on_ranks
from straightforward import reference_em


def golden() -> dict[str, np.ndarray]:
    return dict(np.load(shared("golden/emcl_reference.npz")))


def layer(parameters: np.ndarray, mu: np.ndarray) -> EMCL:
    k, iterations, temperature, beta, momentum = parameters[:5]
    emcl = EMCLLayer(bases=int(k), iterations=int(iterations), temperature=temperature, beta=beta, momentum=momentum)
    emcl.mu.copy_(torch.from_numpy(mu[0]))
    return emcl


@pytest.mark.parametrize("case", ["joint", "inference", "small"])
def test_output_and_state_equal_the_reference(case: str) -> None:
    numbers = golden()
    emcl = layer(numbers[f"{case}/params"], numbers[f"{case}/mu0"])
    rows = torch.from_numpy(numbers[f"{case}/x"])
    (evaluated,) = emcl.eval()(rows)
    np.testing.assert_allclose(evaluated.numpy(), numbers[f"{case}/eval"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(emcl.mu.numpy(), numbers[f"{case}/mu0"][0])  # evaluation does not move it
    (trained,) = emcl.train()(rows)
    np.testing.assert_allclose(trained.numpy(), numbers[f"{case}/train"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(emcl.mu.numpy(), numbers[f"{case}/mu_after_train"][0], atol=1e-5, rtol=0)


def test_similarity_equals_the_reference() -> None:
    numbers = golden()
    parameters = numbers["similarity/params"]
    emcl = layer(parameters, numbers["similarity/mu0"]).eval()
    text, frames, mask = (torch.from_numpy(numbers[f"similarity/{key}"]) for key in ("text", "frames", "mask"))
    scores = similarity(text, frames, mask, temperature=float(parameters[5]), regulariser=emcl)
    np.testing.assert_allclose(scores.numpy(), numbers["similarity/logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rows", "scale"), [(5, 1.0), (300, 1.0), (5000, 1.0), (5000, 10.0), (16512, 10.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_moments_are_as_exact_as_the_iterations_over_rows(rows: int, scale: float, seed: int) -> None:
    """In float32 a feature between two bases may fall to either: measured against float64, ours errs no more."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=generator) + torch.randn(64, generator=generator)
    x = scale * torch.nn.functional.normalize(x, dim=-1)
    emcl = EMCL(bases=16, beta=1.0).eval()
    emcl.mu.copy_(torch.linspace(-1, 1, 16))
    exact = reference_em(x.double(), emcl.mu.double())
    ours = emcl(x)[0] - x
    published = reference_em(x, emcl.mu)
    assert (ours - exact).abs().max() <= max(1e-5, 1.01 * float((published - exact).abs().max()))


def test_the_reconstruction_is_a_constant_to_autograd() -> None:
    x = torch.randn(20, 8, requires_grad=True)
    (corrected,) = EMCL(bases=4)(x)
    corrected.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_in_float32_whatever_the_model_is_cast_to(dtype: torch.dtype) -> None:
    emcl = EMCL(bases=8)
    emcl.mu.copy_(torch.linspace(0.1, 0.9, 8))
    before = emcl.mu.clone()
    model = torch.nn.Sequential(emcl, torch.nn.Linear(4, 4)).to(dtype)
    assert emcl.mu.dtype == torch.float32
    torch.testing.assert_close(emcl.mu, before, rtol=0, atol=0)
    assert model.state_dict()["0.mu"].dtype == torch.float32
    (corrected,) = emcl(torch.randn(6, 4, dtype=dtype))
    assert corrected.dtype == dtype


def test_training_moves_the_state_which_is_in_the_state_dict() -> None:
    emcl = EMCL(bases=8)
    before = emcl.state_dict()["mu"].clone()
    emcl(torch.randn(30, 16))
    assert not torch.equal(emcl.state_dict()["mu"], before)


def _own_rows(ranks: Ranks, x: torch.Tensor, bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    emcl = EMCL(bases=16)
    emcl.mu.copy_(torch.linspace(-1, 1, 16))
    own = x[bounds[ranks.rank] : bounds[ranks.rank + 1]]
    (corrected,) = emcl(own, all_reduce=ranks.sum)
    return corrected, emcl.mu


@pytest.mark.parametrize("bounds", [[0, 40, 97], [0, 1, 60, 97], [0, 20, 40, 80, 97]])
def test_ranks_with_unequal_rows_get_what_one_process_gets(bounds: list[int], tmp_path: Path) -> None:
    x = torch.randn(97, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    ((whole, state),) = run_on_ranks(_own_rows, 1, tmp_path, x, [0, 97])
    results = run_on_ranks(_own_rows, len(bounds) - 1, tmp_path, x, bounds)
    torch.testing.assert_close(torch.cat([corrected for corrected, _ in results]), whole, atol=1e-5, rtol=0)
    for _, mu in results:
        torch.testing.assert_close(mu, state, atol=1e-6, rtol=0)
        assert torch.equal(mu, results[0][1])  # the same bits on every rank


def test_the_folder_needs_torch_alone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "platform/emcl/em", tmp_path / "em")
    code = (
        "import em, torch, sys; em.EMCL()(torch.randn(4, 8)); v = torch.randn(9, 8); em.SharedFactors().fit(v, v);"
        "assert not any(m.startswith('emcl') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(("arguments", "named"), [({"variant": "compakt"}, "variant"), ({"bases": 0}, "basis")])
def test_impossible_settings_are_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EMCL(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["reference", "compact"])
def test_tf32_is_off_where_bases_are_found_and_left_as_it_was(variant: str) -> None:
    layer, seen = EMCL(variant=variant, bases=4, width=16), []
    rows = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))

    def measure() -> list[Moments]:
        seen.append(torch.get_float32_matmul_precision())
        return layer.measure(rows, rows)

    torch.set_float32_matmul_precision("high")
    try:
        layer.correction(measure)(rows)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
