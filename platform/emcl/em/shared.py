"""Factors that videos and their sentences share, and the log-likelihood ratio that scores a pair by them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import torch
from torch import Tensor

from .correlation import Axes, Factors
from .folds import choose_shrinkage
from .moments import AllReduce
from .pairs import Block, Blocks, Covariances, Means, PairMoments, directions, mean_rows
from .state import ExactState, as_tensor

SHRINKAGE = (1.0, 0.3)
"""s_v and s_t that suit some thousand videos; used where there are too few to choose by."""
VIDEOS_AT_ONCE = 8_192
"""In a block of `fit`."""
FACTS = ("videos", "texts", "pairs", "shrinkage", "chosen", "held_out")
"""What a fit says of itself."""
STATE = ("video_mean", "video_centre", "video_bases", "text_mean", "text_centre", "text_bases", "correlation")
"""What is kept of a fit: the buffers' names."""


class SharedFactors(ExactState):
    """K factors of pairs of videos and sentences, whose codes say how likely a pair is one.

    The features are rows of any model: a video's (n, D_v), for example the mean of its frames' outputs of the image
    tower, and its sentences' (m, D_t). The state is float64. A row's codes depend on that row alone; the scale of
    either modality does not matter.

    Args:
        bases: K; no more than either modality is wide are made. Those beyond what the pairs show have small
            correlations, 0 without noise, and add little.
        iterations: T of EM.
        shrinkage: s_v and s_t, how much of the mean variance is added to every direction of each modality; None
            chooses them by `folds` of the training videos.
        folds: how many.
        seed: of the initial bases.
    """

    def __init__(
        self,
        *,
        bases: int = 128,
        iterations: int = 4,
        shrinkage: tuple[float, float] | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if bases < 1 or iterations < 1 or folds < 2:
            raise ValueError("shared factors want at least 1 basis, 1 iteration and 2 folds")
        if shrinkage is not None and not (len(shrinkage) == 2 and all(0 < one < float("inf") for one in shrinkage)):
            raise ValueError(f"shrinkage is two numbers above 0, of videos and of texts, not {shrinkage}")
        self.bases, self.iterations, self.folds, self.seed = bases, iterations, folds, seed
        self.shrinkage = None if shrinkage is None else (float(shrinkage[0]), float(shrinkage[1]))
        self.facts: dict[str, Any] = {}
        """What they were fitted on: numbers of videos, texts and pairs; the shrinkage, and whether it was chosen by
        folds, by hand, or is the usual one, the pairs being too few; by folds also `held_out`, how far above random
        ones a pair scores by factors of the other folds, which is not above 0 if the factors are of no use."""
        self.objective: list[float] = []
        """|M Q|_F before the first iteration of EM and after each."""
        self.video_mean: Tensor
        self.video_centre: Tensor
        self.video_bases: Tensor
        self.text_mean: Tensor
        self.text_centre: Tensor
        self.text_bases: Tensor
        self.correlation: Tensor

    # --- fitting

    def fit(self, video: Any, text: Any, owner: Any = None, *, group: Any = None) -> Self:
        """Finds the factors of pairs, NumPy or torch; forgets what was fitted before.

        Rows of zeros are absent ones; they do not count, nor do rows that are not finite.

        Args:
            video: (n, D_v).
            text: (m, D_t), any number for a video, none too.
            owner: (m,) each text's video, as its row; by default text i belongs to video i.
            group: (n,) any whole numbers: videos with the same one, such as clips of one film, are not divided between
                folds. By default each video is a group.

        Raises:
            ValueError: shapes or owners that do not fit.
        """
        video, text = as_tensor(video), as_tensor(text)
        if owner is None and len(video) != len(text):
            raise ValueError(f"{len(text)} texts of {len(video)} videos: `owner` says which text is whose")
        owners = torch.arange(len(text)) if owner is None else as_tensor(owner)
        groups = torch.arange(len(video)) if group is None else as_tensor(group)
        block = Block(*(rows.to(video.device) for rows in (video, text, owners, groups))).checked()
        block = block._replace(group=block.group.unique(return_inverse=True)[1])
        return self.fit_blocks(lambda: block.split(VIDEOS_AT_ONCE))

    @torch.no_grad()
    def fit_blocks(self, blocks: Blocks, *, all_reduce: AllReduce | None = None) -> Self:
        """As `fit`, of blocks of videos with all their texts; `blocks` is called twice.

        With `all_reduce` the blocks are this rank's, and the factors those of all ranks' pairs: two messages are sent,
        of the mean rows and of the moments. Every rank gives at least one block, of no rows if it has none.
        """
        means = mean_rows((block.checked() for block in blocks()), all_reduce)
        parts = self._measure(blocks, means, all_reduce)
        moments = sum(parts[1:], parts[0])
        by_folds = None if self.shrinkage else choose_shrinkage(parts, moments, self._axes, self._factors)
        shrinkage = self.shrinkage or (by_folds.shrinkage if by_folds else SHRINKAGE)
        centres = moments.means
        axes = self._axes(moments.covariances(centres))
        factors = self._factors(axes, shrinkage)
        self.keep(
            video_mean=means.video,
            text_mean=means.text,
            video_centre=centres.video,
            text_centre=centres.text,
            video_bases=axes.video @ factors.video,
            text_bases=axes.text @ factors.text,
            correlation=factors.correlation,
        )
        self.objective = factors.objective.tolist()
        chosen = "by hand" if self.shrinkage else "by folds" if by_folds else "the usual one"
        self.facts = {**moments.counts, "shrinkage": list(shrinkage), "chosen": chosen}
        self.facts |= {"held_out": by_folds.held_out} if by_folds else {}
        return self

    def _measure(self, blocks: Blocks, means: Means, all_reduce: AllReduce | None) -> list[PairMoments]:
        """Moments of each fold of the videos; of all together where nothing is to be chosen."""
        folds = self.folds if self.shrinkage is None else 1
        parts: list[PairMoments | None] = [None] * folds
        for block in blocks():
            block = block.checked()
            for fold in range(folds):
                here = block if folds == 1 else block.of_fold(fold, folds)
                moments = PairMoments.of(here.video, here.text, here.owner, means)
                before = parts[fold]
                parts[fold] = moments if before is None else before + moments
        if parts[0] is None:
            raise ValueError("no block when asked for the second time: `blocks` makes them anew at every call")
        return PairMoments.sum([part for part in parts if part is not None], all_reduce)

    def _axes(self, covariances: Covariances) -> Axes:
        return Axes.of(covariances, self.bases, self.seed)

    def _factors(self, axes: Axes, shrinkage: tuple[float, float]) -> Factors:
        return axes.factors(shrinkage, self.iterations)

    # --- using them

    def transform(self, video: Any, text: Any) -> tuple[Any, Any]:
        """Codes of both: b (n, K) and a (m, K), of the kind of the input."""
        return self.video_codes(video), self.text_codes(text)

    def video_codes(self, video: Any) -> Any:
        """b (n, K). Zeros for a row of zeros; NaN for one that is not finite."""
        return _like(video, self._codes(as_tensor(video), "video"))

    def text_codes(self, text: Any) -> Any:
        """a (m, K), as `video_codes`."""
        return _like(text, self._codes(as_tensor(text), "text"))

    def score(self, text: Any, video: Any) -> Any:
        """Log-likelihood ratio of each text with each video, (m, n): being a pair against being of different ones.

        It lacks the constant c = -sum_k log(1 - r_k^2) / 2, which all pairs have in common. With a row of zeros the
        score is -c: nothing is known of it, so that the whole ratio is 0. A row that is not finite gives NaN.
        """
        return _like(text, self._vectors(as_tensor(text), "text") @ self._vectors(as_tensor(video), "video").T)

    def as_inner_product(self, text: Any, video: Any) -> tuple[Any, Any]:
        """Vectors (m, K + 2) and (n, K + 2) whose inner products are the scores, for an index."""
        return self.text_vectors(text), self.video_vectors(video)

    def text_vectors(self, text: Any) -> Any:
        """[sqrt(w) a, 1, -q.a^2], (m, K + 2)."""
        return _like(text, self._vectors(as_tensor(text), "text"))

    def video_vectors(self, video: Any) -> Any:
        """[sqrt(w) b, -q.b^2, 1], (n, K + 2)."""
        return _like(video, self._vectors(as_tensor(video), "video"))

    def _codes(self, rows: Tensor, side: str) -> Tensor:
        unit = self._directions(rows, side)
        return torch.where(unit.any(1, keepdim=True), self._of_directions(unit, side), 0.0)

    def _vectors(self, rows: Tensor, side: str) -> Tensor:
        unit = self._directions(rows, side)
        codes, r = self._of_directions(unit, side), self.correlation
        weight = r / (1 - r.square())
        here = unit.any(1, keepdim=True)
        square = -(codes.square() @ (weight * r / 2))[:, None]
        square = torch.where(here, square, torch.log1p(-r.square()).sum() / 2)
        last = [here.to(square.dtype), square] if side == "text" else [square, here.to(square.dtype)]
        return torch.cat([torch.where(here, weight.sqrt() * codes, 0.0), *last], 1)

    def _directions(self, rows: Tensor, side: str) -> Tensor:
        if not self.state_names:
            raise RuntimeError("nothing fitted yet: call fit(video, text) first, or load")
        mean: Tensor = getattr(self, f"{side}_mean")
        if rows.ndim != 2 or rows.shape[1] != len(mean):
            raise ValueError(f"{side} features are (n, {len(mean)}) as those fitted, not {tuple(rows.shape)}")
        return directions(rows.to(mean.device), mean)

    def _of_directions(self, unit: Tensor, side: str) -> Tensor:
        centre, bases = getattr(self, f"{side}_centre"), getattr(self, f"{side}_bases")
        return (unit - centre) @ bases

    # --- keeping them

    def save(self, path: str | Path, **facts: Any) -> None:
        """Settings, state and facts in a NumPy archive (`.npz`) without pickled code.

        Args:
            facts: further JSON values that `load` gives back in `facts`, such as where the pairs are from.

        Raises:
            ValueError: a fact of the fit's own names.
        """
        import numpy as np

        if not self.state_names:
            raise RuntimeError("nothing fitted yet: call fit(video, text) first")
        if taken := facts.keys() & set(FACTS):
            raise ValueError(f"facts of the fit itself: {', '.join(sorted(taken))}")
        names = ("bases", "iterations", "shrinkage", "folds", "seed")
        about = {
            "settings": {name: getattr(self, name) for name in names},
            "facts": {**self.facts, **facts},
            "objective": self.objective,
        }
        state = {name: value.cpu().numpy() for name, value in self.state_dict().items()}
        whole = io.BytesIO()
        np.savez(whole, about=np.array(json.dumps(about)), **state)
        temporary = Path(f"{path}.{os.getpid()}.part")  # a file that was there stays until the new one is whole
        temporary.write_bytes(whole.getvalue())
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            ValueError: something else is in the file.
        """
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as content:
                about = json.loads(str(content["about"]))
                state = {name: torch.from_numpy(content[name]) for name in STATE}
            factors = cls(**about["settings"])
            factors.keep(**state)
            factors.facts, factors.objective = about["facts"], about["objective"]
            for side in ("video", "text"):
                width = len(getattr(factors, f"{side}_mean"))
                bases, centre = getattr(factors, f"{side}_bases"), getattr(factors, f"{side}_centre")
                if centre.shape != (width,) or bases.shape != (width, len(factors.correlation)):
                    raise ValueError(f"its arrays of {side}s do not fit each other")
        except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} holds no shared factors ({error})") from None
        return factors.eval()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Makes the state, whose sizes the saved one tells."""
        saved = {name: state_dict.get(prefix + name) for name in STATE}
        if all(value is not None for value in saved.values()):
            device = self.correlation.device if self.state_names else None
            self.keep(**{name: torch.empty_like(value, device=device) for name, value in saved.items()})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _like(given: Any, result: Tensor) -> Any:
    """The result as NumPy if that was given, in float64 only if the given was."""
    if isinstance(given, Tensor):
        return result.to(given.device, torch.float64 if given.dtype == torch.float64 else torch.float32)
    double = getattr(given, "dtype", None) == "float64"
    return (result if double else result.float()).cpu().numpy()
