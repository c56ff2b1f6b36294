"""Plots of the ablation: the sweeps, and both modalities projected on their first two principal components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ablation_models import Job, embed, fitted
from emcl.model.embeddings import Embeddings
from emcl.train.export import open_export

COLOURS = {"compact, joint": "tab:blue", "reference, joint": "tab:orange", "compact, at inference": "tab:green"}
SHOWN = 476
"""Pairs in the plot of the embedding space."""


def draw_sweeps(path: Path, result: Mapping[str, Any], title: str) -> None:
    """R@1 over each setting (mean and range of the seeds), with a line for no EMCL."""
    axes_of = [axis for axis in result if axis != "no EMCL"]
    figure, axes = _figure(len(axes_of))
    base = result["no EMCL"]
    for number, (axis, name) in enumerate(zip(axes, axes_of, strict=True)):
        axis.axhspan(min(base), max(base), color="0.85", linewidth=0)
        axis.axhline(np.mean(base), color="0.4", linestyle="--", label="no EMCL")
        ticks: set[float] = set()
        for label, points in result[name].items():
            x = [float(value) for value in points]
            ticks |= set(x)
            y = np.array([np.mean(seeds) for seeds in points.values()])
            low, high = (np.array([pick(seeds) for seeds in points.values()]) for pick in (min, max))
            axis.errorbar(x, y, (y - low, high - y), marker="o", capsize=3, label=label, color=COLOURS[label])
        axis.set(xscale="log", xlabel=name)
        axis.set_xticks(sorted(ticks), [f"{value:g}" for value in sorted(ticks)], minor=False)
        axis.minorticks_off()
        if not number:
            axis.set_ylabel("R@1, mean of both directions, validation")
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def draw_space(
    path: Path, model_paths: Mapping[str, Job], shards: str, inference: Mapping[str, Any], train: str
) -> None:
    """Test videos and texts: without EMCL, with bases fitted afterwards, and of the jointly trained compact model."""
    model, config = open_export(model_paths["none"].export)
    split = embed(model, config, shards).one_sentence()
    layer = fitted(embed(model, config, train, 4), **inference)
    joint, joint_config = open_export(model_paths["compact"].export)
    theirs = embed(joint, joint_config, shards).one_sentence()
    own: Any = joint.heads["retrieval"].emcl
    assert own is not None
    with torch.no_grad():
        panels = {
            "no EMCL": _rows(split),
            "compact, at inference": tuple(layer(*_rows(split))),
            "compact, joint": tuple(own(*_rows(theirs))),
        }
    figure, axes = _figure(len(panels))
    for axis, (label, (video, text)) in zip(axes, panels.items(), strict=True):
        video, text = F.normalize(video[:SHOWN], dim=1), F.normalize(text[:SHOWN], dim=1)
        both = torch.cat([video, text])
        _, _, directions = torch.pca_lowrank(both, q=2, niter=8)
        centre = both.mean(0)
        v, t = (video - centre) @ directions, (text - centre) @ directions
        for pair in range(0, len(v), 12):
            axis.plot([v[pair, 0], t[pair, 0]], [v[pair, 1], t[pair, 1]], color="0.8", linewidth=0.7, zorder=0)
        axis.scatter(*v.T, s=6, label="videos")
        axis.scatter(*t.T, s=6, label="texts")
        gap = (video.mean(0) - text.mean(0)).norm()
        axis.set(title=f"{label}: gap {gap:.2f}", xticks=[], yticks=[])
        axis.set_aspect("equal", "datalim")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def _rows(split: Embeddings) -> tuple[Tensor, Tensor]:
    return split.video_means, split.text


def _figure(panels: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9 * panels, 3.7), dpi=110)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])
