"""EMCL on features of any model: recall before and after, corrected features, and codes by shared factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from emcl.em import EMCL, SharedFactors
from emcl.errors import UserError, first_line
from emcl.evaluate.feature_files import Features
from emcl.evaluate.results import lines_of
from emcl.metrics.retrieval_metrics import retrieval_metrics

Metrics = dict[str, dict[str, float]]


def recall(features: Features, owner: NDArray[np.int64]) -> Metrics:
    """Recall by the cosines of texts and videos."""
    return retrieval_metrics(cosines(features), owner)


def cosines(features: Features) -> NDArray[np.float32]:
    """(texts, videos)."""
    text, video = (F.normalize(torch.from_numpy(rows), dim=1) for rows in (features.text, features.video))
    return (text @ video.T).numpy()


def fit(features: Features, *, bases: int, beta: float, balance: float) -> EMCL:
    """A compact layer fitted to the features.

    Raises:
        UserError: more bases than the features are wide, or none.
    """
    try:
        layer = EMCL(variant="compact", bases=bases, beta=beta, balance=balance)
        return layer.fit(features.video, features.text).eval()
    except ValueError as error:
        raise UserError(str(error)) from None


def open_layer(path: Path) -> EMCL:
    """The layer that `write` saved.

    Raises:
        UserError: no such file, or something else is in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `emcl transform` writes bases.pt")
    try:
        return EMCL.load(path)
    except Exception:  # torch.load raises many kinds of error for other files, with unsafe advice
        raise UserError(f"{path} holds no EMCL bases; `emcl transform` writes bases.pt") from None


def transform(layer: EMCL, features: Features) -> Features:
    """Raises UserError: the layer's bases are of another width."""
    try:
        return Features(layer.transform(features.video), layer.transform(features.text))
    except ValueError as error:
        raise UserError(str(error)) from None


def fit_factors(features: Features, owner: NDArray[np.int64], *, bases: int, shrinkage: Any) -> SharedFactors:
    """Factors of pairs; `owner` (texts,) is each text's video.

    Raises:
        UserError: fewer than two pairs.
    """
    factors = SharedFactors(bases=bases, shrinkage=shrinkage).fit(features.video, features.text, owner)
    if factors.facts["pairs"] < 2:
        raise UserError(f"{len(features.video)} videos and {len(owner)} texts have no two pairs that differ")
    return factors


def open_factors(path: Path) -> SharedFactors:
    """The factors that `write` saved.

    Raises:
        UserError: no such file, or something else is in it.
    """
    try:
        return SharedFactors.load(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `emcl transform --variant shared` writes factors.npz") from None
    except ValueError as error:
        raise UserError(f"{first_line(error)}; `emcl transform --variant shared` writes factors.npz") from None


def codes(factors: SharedFactors, features: Features) -> Features:
    """Raises UserError: the factors are of other widths."""
    try:
        return Features(*factors.transform(features.video, features.text))
    except ValueError as error:
        raise UserError(str(error)) from None


def recall_with(
    factors: SharedFactors, features: Features, owner: NDArray[np.int64], logit_scale: float
) -> dict[str, Metrics]:
    """By the factors; for features of one width also by the cosine, and by the sum of both log-odds."""
    ratio_QG = factors.score(features.text, features.video)
    by_factors = {"factors": retrieval_metrics(ratio_QG, owner)}
    if not features.same_width:
        return by_factors
    cosine_QG = cosines(features)
    return {
        "cosine": retrieval_metrics(cosine_QG, owner),
        **by_factors,
        "both": retrieval_metrics(logit_scale * cosine_QG + ratio_QG, owner),
    }


def write(folder: Path, features: Features, fitted: EMCL | SharedFactors) -> None:
    """`video.npy`, `text.npy`, and `bases.pt` or `factors.npz`, which `load` of EMCL or SharedFactors opens."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "video.npy", features.video)
    np.save(folder / "text.npy", features.text)
    fitted.save(folder / ("factors.npz" if isinstance(fitted, SharedFactors) else "bases.pt"))


def comparison(metrics: dict[str, Metrics]) -> str:
    """All of them by direction, as a table."""
    directions = next(iter(metrics.values()))
    return lines_of(
        {
            f"{direction}, {label}/{name}": value
            for direction in directions
            for label, of_label in metrics.items()
            for name, value in of_label[direction].items()
        }
    )
