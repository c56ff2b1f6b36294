"""The EMCL layer: both variants that correct rows, `reference` and `compact`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .moments import AllReduce, Moments, without_tf32
from .state import ExactState, as_tensor

VARIANTS = ("reference", "compact")
_EPSILON = 1e-6
_POWERS, _SQUARINGS, _TURNS = 2, 3, 6
"""For the codes' eigenvectors: QR iterations, squarings of the matrix before each, and Jacobi steps."""
_NOISE = 1e-6
"""A variance below this share of the squared norm is rounding, not signal."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The result of EM, as a map: x -> x + beta (Z diag(w) Z^T x - |x| c)."""

    bases: Tensor  # Z (D, K)
    weights: Tensor  # w (K,)
    offset: Tensor | None  # c (D,)
    beta: float | Tensor
    constant: bool
    """Whether x_hat is a constant to autograd."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (..., D) with beta times their reconstruction added."""
        with without_tf32(), torch.autocast(rows.device.type, enabled=False):
            flat = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]  # (N, D)
            x = (flat.detach() if self.constant else flat).float()
            codes, bases = (x @ self.bases) * self.weights, self.bases  # (N, K)
            if self.offset is not None:  # one more basis, whose code is -|x|
                codes = torch.cat([codes, -torch.linalg.vector_norm(x, dim=1, keepdim=True)], 1)
                bases = torch.cat([bases, self.offset[:, None]], 1)
            # one pass over the rows: reconstructions are never held beside them
            return torch.addmm(flat.float(), self.beta * codes, bases.T).to(rows.dtype).view_as(rows)


@torch.no_grad()
def fit_reference(
    moments: Moments, mu: Tensor, *, iterations: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The published EM, from moments.

    Args:
        moments: of the rows X (N, D).
        mu: (K,) the scalar that each basis starts from.
        iterations: T; at least 1.
        temperature: lambda of the E-step's softmax.

    Returns:
        bases (D, K), their weights (K,), and the mean code (K,) that moves `mu` in training.
    """
    cross = moments.total[:, None] * mu[None, :]  # X^T M, (D, K)
    for _ in range(iterations):
        # Keep this order of operations: rounding decides the basis of a feature between two.
        bases = torch.softmax(cross if temperature == 1 else cross / temperature, dim=1)  # Z, (D, K)
        bases = bases / (_EPSILON + bases.sum(0))
        unscaled = moments.gram @ bases  # X^T X Z, (D, K)
        norm = _EPSILON + (bases * unscaled).sum(0).clamp_min(0).sqrt()  # (K,)
        cross = unscaled / norm
    mean_code = (moments.total @ bases) / norm / moments.count.clamp_min(1)  # (K,)
    return bases, 1 / norm, mean_code


@torch.no_grad()
def fit_compact(
    covariance: Tensor, start: Tensor, *, iterations: int, observe: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """EM for K bases of rows with this covariance (D, D), from orthonormal `start` (D, K).

    With Z^T Z = 1, both steps together are Z <- orth(C Z): U^T A = N C Z, and (A^T A)^-1 does not change its span.

    Returns:
        orthonormal bases (D, K), sorted by the variance of their codes; those variances (K,); and with `observe` the
        objective, the mean squared reconstruction error, before the first iteration and after each.
    """
    total = covariance.diagonal().sum()
    tiny = _tiny(total)  # times the bases, so that a basis without variance is kept
    bases, objective = start, []
    for _ in range(iterations):
        image = covariance @ bases
        if observe:
            objective.append(total - (bases * image).sum())
        bases = torch.linalg.qr(torch.addcmul(image, tiny, bases))[0]
    image = covariance @ bases
    if observe:
        objective.append(total - (bases * image).sum())
    variance, rotation = _own_axes(bases.T @ image)
    return bases @ rotation, variance, objective


def _own_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (K, K) of the codes' covariance, by falling variance, and the variances (K,).

    By a fixed number of steps, since `eigh` checks for convergence, and the host would wait for the device in every
    training step. QR iterations of a high power separate variances that are far from each other; Jacobi rotations of
    all pairs at once, made orthonormal, do the rest, faster and faster. After the first batch only axes of nearly equal
    variance are still mixed, whose weights are nearly equal too; the next step continues from them.
    """
    size = covariance.diagonal().sum().clamp_min(_EPSILON**2)
    turned = (covariance / size).double()  # powers need the range of float64
    same = torch.eye(len(turned), dtype=turned.dtype, device=turned.device)
    rotation = same
    for step in range(_POWERS + _TURNS):
        if step < _POWERS:
            turning = turned
            for _ in range(_SQUARINGS):
                turning = turning @ turning
        else:
            half = turned.diagonal() / 2
            ratio = (turned / (half[None, :] - half[:, None])).nan_to_num(0.0, 0.0, 0.0)  # tan(2 angle)
            turning = same.add(ratio.atan(), alpha=0.5)
        turn = torch.linalg.qr(turning)[0]
        turned, rotation = turn.T @ turned @ turn, rotation @ turn
    variance, order = turned.diagonal().sort(descending=True)
    return variance.float().clamp_min(0) * size, rotation[:, order].float()


class EMCL(ExactState):
    """The EMCL layer: adds to every feature row its reconstruction from K bases that EM finds.

    The state (float32, whatever precision the model is cast to) is updated in training mode, and by `fit`. A compact
    layer that has seen no rows adds nothing.

    Args:
        bases: K.
        iterations: T.
        temperature: lambda (reference).
        beta: weight of the reconstruction.
        momentum: alpha of the moving average.
        balance: how equally the bases contribute, 0 to 1 (compact).
        variant: `reference`, the published behaviour, or `compact`.
        width: D; by default that of the first rows (compact).
        seed: of the initial bases.
    """

    def __init__(
        self,
        *,
        bases: int = 32,
        iterations: int = 9,
        temperature: float = 1.0,
        beta: float = 3.0,
        momentum: float = 0.9,
        balance: float = 0.5,
        variant: str = "reference",
        width: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if variant == "shared":
            raise ValueError("shared factors correct no rows, they score pairs: that is emcl.SharedFactors")
        if variant not in VARIANTS:
            raise ValueError(f"emcl variant {variant!r} is none of {', '.join(VARIANTS)}")
        if bases < 1 or iterations < 1 or temperature <= 0:
            raise ValueError("emcl wants at least 1 basis, 1 iteration and a temperature above 0")
        self.variant, self.bases, self.iterations, self.temperature = variant, bases, iterations, temperature
        self.beta, self.momentum, self.balance, self.seed = beta, momentum, balance, seed
        self.mu: Tensor
        self.start: Tensor
        self.gram: Tensor
        self.total: Tensor
        self.count: Tensor
        if variant == "reference":
            # The published initialisation normalises along an axis of length 1, which leaves the signs.
            signs = torch.randn(bases, generator=torch.Generator().manual_seed(seed)).sign()
            self.keep(mu=signs)
        elif width is not None:
            self._allocate(width)

    # --- the layer

    def forward(self, *blocks: Tensor, all_reduce: AllReduce | None = None) -> tuple[Tensor, ...]:
        """Fits EM on all blocks together (video rows and text rows, each (..., D)) and returns them corrected.

        In evaluation the compact variant fits nothing: its bases are those of training. With `all_reduce`, blocks are
        this rank's rows and the fit is that of all ranks' rows.
        """
        correction = self.correction(lambda: self.measure(*blocks), all_reduce=all_reduce)
        return tuple(correction(block) for block in blocks)

    def measure(self, *blocks: Tensor) -> list[Moments]:
        """The moments that this variant fits to: of all rows together, or of each modality's directions."""
        if self.variant == "reference":
            moments = [Moments.of(block) for block in blocks]
            return [sum(moments[1:], moments[0])]
        return [Moments.of_directions(block) for block in blocks]

    @torch.no_grad()
    def correction(self, measure: Callable[[], list[Moments]], *, all_reduce: AllReduce | None = None) -> Correction:
        """The map for the present rows, whose moments `measure` gives if needed; updates the state in training."""
        if self.variant == "compact" and not self.training:
            return self._compact()
        with without_tf32():
            return self._fitted(measure(), all_reduce)

    def _fitted(self, moments: list[Moments], all_reduce: AllReduce | None) -> Correction:
        with torch.autocast(moments[0].gram.device.type, enabled=False):  # sums over many rows need float32
            moments = Moments.sum(moments, all_reduce)
            return self._reference(moments[0]) if self.variant == "reference" else self._learn(moments, self.momentum)

    def _reference(self, moments: Moments) -> Correction:
        bases, weights, mean_code = fit_reference(
            moments, self.mu, iterations=self.iterations, temperature=self.temperature
        )
        if self.training:
            kept = torch.where(mean_code.isfinite().all(), mean_code, self.mu)  # no update if it is not finite
            self.mu.mul_(self.momentum).add_(kept, alpha=1 - self.momentum)
        return Correction(bases=bases, weights=weights, offset=None, beta=self.beta, constant=True)

    def _learn(self, moments: Sequence[Moments], momentum: float) -> Correction:
        """Adds the rows' moments to the moving sums and continues EM from the present bases."""
        self._take(moments, momentum)
        bases, _, _ = fit_compact(self._covariance(), self.start, iterations=self.iterations, observe=False)
        self.start.copy_(bases)
        return self._compact()

    def _take(self, moments: Sequence[Moments], momentum: float) -> None:
        """Updates the moving sums with each modality's moments, with equal weights."""
        if "start" not in self.state_names:
            self._allocate(moments[0].gram.shape[0], moments[0].gram.device)
        gram, total = torch.stack([each.gram for each in moments]), torch.stack([each.total for each in moments])
        count = torch.stack([each.count for each in moments])
        # no .item(), which would wait for the device
        whole = (gram.sum((1, 2)) + total.sum(1)).isfinite()  # (modalities,)
        present = ((count > 0) & whole).float()
        share = present / present.sum().clamp_min(1)
        count = count.clamp_min(1)
        centre = torch.where(whole[:, None], total, 0.0) / count[:, None]
        mean = share @ centre
        second = torch.tensordot(share / count, torch.where(whole[:, None, None], gram, 0.0), 1)
        covariance = torch.addmm(second, (share[:, None] * centre).T, centre, alpha=-1)
        fresh = (present.sum() > 0).float()
        keep = torch.where(fresh > 0, momentum, 1.0)
        self.gram.mul_(keep).add_(covariance)
        self.total.mul_(keep).add_(mean * fresh)
        self.count.mul_(keep).add_(fresh)

    def _covariance(self) -> Tensor:
        return self.gram / self.count.clamp_min(_EPSILON)

    def _compact(self) -> Correction:
        """The map of the present bases."""
        if "start" not in self.state_names:
            raise RuntimeError("this compact EMCL layer has no width yet: give `width`, or let it see training rows")
        bases = self.start
        covariance, mean = self._covariance(), self.total / self.count.clamp_min(_EPSILON)
        variance = (bases * (covariance @ bases)).sum(0)
        signal = variance > _NOISE * (variance.sum() + mean.square().sum()).clamp_min(_NOISE)
        safe = torch.where(signal, variance, 1.0)
        # over the fitted directions, |x_hat|^2 has the mean sum_k v_k^(1 - balance) / r^2
        size = torch.where(signal, safe.pow(1 - self.balance), 0.0).sum().clamp_min(_NOISE).sqrt()
        weights = torch.where(signal, safe.pow(-self.balance / 2), 0.0) / size
        offset = (bases * weights) @ (mean @ bases)
        return Correction(bases=bases, weights=weights, offset=offset, beta=self.beta, constant=False)

    # --- on features of any model, as scikit-learn's transformers

    def fit(self, video: Any, text: Any | None = None) -> Self:
        """Finds the bases of features (n, D) of one or two modalities, NumPy or torch; forgets what was fitted before.

        With all rows at hand, the limit of EM is computed directly: the leading eigenvectors of the covariance.

        Raises:
            ValueError: not two-dimensional, of different widths, or the reference variant, which fits the rows that
                it is given and keeps no bases.
        """
        if self.variant == "reference":
            raise ValueError(
                "the reference variant keeps no bases to fit: call the layer on the rows, or use `compact`"
            )
        blocks = [as_tensor(block) for block in (video, text) if block is not None]
        if any(block.ndim != 2 for block in blocks) or len({block.shape[-1] for block in blocks}) != 1:
            raise ValueError(f"features are (n, D) of one width, not {[tuple(block.shape) for block in blocks]}")
        self._allocate(blocks[0].shape[1], blocks[0].device)
        self._take([Moments.of_directions(block) for block in blocks], 0.0)
        self.start.copy_(torch.linalg.eigh(self._covariance())[1][:, -self.bases :].flip(1))
        return self

    @torch.no_grad()
    def transform(self, features: Any) -> Any:
        """Corrected features (n, D), of the kind and type of the input; each row depends on that row alone."""
        rows = as_tensor(features)
        if self.variant == "reference":
            raise ValueError("the reference variant has no bases: call the layer on all rows that are compared")
        if "start" not in self.state_names:
            raise RuntimeError("nothing fitted yet: call fit(video, text) first, or load")
        if rows.shape[-1] != self.start.shape[0]:
            raise ValueError(f"features have width {rows.shape[-1]}, the bases {self.start.shape[0]}")
        corrected = self._compact()(rows.to(self.start.device))
        return corrected.to(features.device) if isinstance(features, Tensor) else corrected.cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Settings and state in one file, without any pickled code."""
        settings = {
            name: getattr(self, name)
            for name in ("bases", "iterations", "temperature", "beta", "momentum", "balance", "variant", "seed")
        }
        torch.save({"settings": settings, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote, in evaluation mode."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        layer = cls(**content["settings"])
        layer.load_state_dict(content["state"])
        return layer.eval()

    # --- the state

    def _allocate(self, width: int, device: torch.device | None = None) -> None:
        if self.bases > width:
            raise ValueError(f"emcl wants at most as many bases as the features are wide: {self.bases} of {width}")
        draw = torch.randn(width, self.bases, generator=torch.Generator().manual_seed(self.seed))
        start = torch.linalg.qr(draw)[0].to(device)
        zeros = torch.zeros(width, width, device=device)
        self.keep(start=start, gram=zeros, total=zeros[0].clone(), count=torch.zeros((), device=device))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(f"{prefix}start")
        if self.variant == "compact" and saved is not None and "start" not in self.state_names:
            self._allocate(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _tiny(total: Tensor) -> Tensor:
    return total.clamp_min(_EPSILON) * 1e-12
