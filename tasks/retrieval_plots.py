"""A retrieval result as plots: recall, ranks, similarity, and the gap between texts and videos."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from emcl.errors import UserError
from emcl.model.embeddings import Embeddings
from emcl.pictures import drawn
from emcl.run_folder import EMBEDDINGS, SIMILARITY
from emcl.task import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {"text_to_video": "text to video", "video_to_text": "video to text"}
SHOWN = 400
"""Points of each modality, and lines of a matrix at most."""


def similarity_of(result: Result) -> NDArray[np.float32] | None:
    """(texts, videos); None where it was not kept.

    Raises:
        UserError: the file is damaged.
    """
    path = result.file(SIMILARITY)
    try:
        return load_file(path)["similarity"] if path.is_file() else None
    except (SafetensorError, KeyError):
        raise UserError(f"{path} is not whole: score the run again: emcl evaluate {result.folder}") from None


def embeddings_of(result: Result) -> Embeddings | None:
    """None where they were not kept."""
    path = result.file(EMBEDDINGS)
    return Embeddings.open(path) if path.is_file() else None


def plots(result: Result) -> list[tuple[str, str]]:
    """The plots that the saved files allow: (caption, the picture as a data URL)."""
    pictures = []
    if result.items:
        ranks = {name: np.array(result.items[way]) for way, name in WAYS.items()}
        pictures += [
            ("Recall at k", drawn(lambda figure: _recall(figure, ranks))),
            ("Ranks of the right candidate", drawn(lambda figure: _histogram(figure, ranks))),
        ]
    if (scores_QG := similarity_of(result)) is not None:
        owner = np.array(result.items["video"])
        pictures.append(
            ("Similarity of texts and their videos", drawn(lambda figure: _matrix(figure, scores_QG, owner)))
        )
    if (kept := embeddings_of(result)) is not None:
        pictures.append(("Modality gap", drawn(lambda figure: _gap(figure, kept))))
    return pictures


def _recall(figure: Figure, ranks: dict[str, NDArray[np.int64]]) -> None:
    axis = figure.subplots()
    most = max(int(values.max()) for values in ranks.values())
    steps = np.unique(np.geomspace(1, max(most, 2), 60).astype(int))
    for name, values in ranks.items():
        axis.plot(steps, [100 * (values <= k).mean() for k in steps], label=name)
    axis.set(xscale="log", xlabel="k", ylabel="R@k in %", ylim=(0, 101))
    axis.grid(alpha=0.3)
    axis.legend()


def _histogram(figure: Figure, ranks: dict[str, NDArray[np.int64]]) -> None:
    axis = figure.subplots()
    most = max(int(values.max()) for values in ranks.values())
    edges = np.unique(np.concatenate([np.arange(1, 11), np.geomspace(11, max(most, 11) + 1, 20).astype(int)])) - 0.5
    shares = [np.full(len(values), 100 / len(values)) for values in ranks.values()]
    axis.hist(list(ranks.values()), bins=edges, weights=shares, label=list(ranks))  # type: ignore[arg-type]
    axis.set(xscale="log", xlabel="rank (bins widen above 10)", ylabel="% of the queries")
    axis.legend()


def _matrix(figure: Figure, scores_QG: NDArray[np.float32], owner: NDArray[np.int64]) -> None:
    """The first text of evenly chosen videos beside those videos: the right pairs are the diagonal."""
    axis = figure.subplots()
    videos, first = np.unique(owner, return_index=True)
    chosen = np.linspace(0, len(videos) - 1, min(SHOWN, len(videos))).astype(int)
    shown = axis.imshow(scores_QG[np.ix_(first[chosen], videos[chosen])], cmap="viridis", interpolation="nearest")
    axis.set(xlabel="video", ylabel="text")
    figure.colorbar(shown, ax=axis)


def _gap(figure: Figure, kept: Embeddings) -> None:
    """Unit texts and mean frames on the plane of their two largest components (Liang et al., NeurIPS 2022)."""
    axis = figure.subplots()
    rows = [torch.nn.functional.normalize(features.float(), dim=1) for features in (kept.text, kept.video_means)]
    gap = float((rows[0].mean(0) - rows[1].mean(0)).norm())
    rows = [features[torch.linspace(0, len(features) - 1, min(SHOWN, len(features))).long()] for features in rows]
    both = torch.cat(rows)
    both = both - both.mean(0)
    plane = both @ torch.linalg.svd(both, full_matrices=False)[2][:2].T
    for points, name in zip(plane.split([len(features) for features in rows]), ("texts", "videos"), strict=True):
        axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=8, alpha=0.6, label=name)
    axis.set(title=f"distance of the means {gap:.2f}", xticks=[], yticks=[])
    axis.legend()
