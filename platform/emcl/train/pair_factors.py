"""The factors that videos and their sentences share (`emcl.em.SharedFactors`), fitted to a trained model's outputs.

Rows are the towers' outputs before the heads: of a video the mean over its frames, of every caption its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emcl.config import Config
from emcl.data.captions import AllCaptions, EveryCaption
from emcl.data.split import Split
from emcl.distributed import Ranks
from emcl.em import Block, SharedFactors
from emcl.errors import UserError
from emcl.evaluate.driver import collect, encoded_batches, without_controls
from emcl.model.backbone import Backbone
from emcl.model.feature_cache import hash_of_towers
from emcl.model.pair_scores import FACTOR_WEIGHTS, check_fit, exact_device
from emcl.multitask import VideoLanguageModel, check_tasks
from emcl.run_folder import FACTORS, export_identity
from emcl.secrets import masked
from emcl.task import Evaluation, Lockstep
from emcl.task.prediction import log_odds_scale_of, takes_factors

BATCHES = 64
"""Whose pairs are measured together."""
PAIRS = "pairs"
"""The collator's name."""
GRID = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Weights that are tried on a validation split."""
JUDGED = 1_000
"""Videos of a validation split that they are tried on, at most."""


def wanted(config: Config) -> bool:
    """Whether the settings ask for factors, and a task counts them."""
    return config.emcl.factors > 0 and any(takes_factors(kind) for kind in check_tasks(config).values())


def _tasks(model: VideoLanguageModel) -> list[str]:
    """Those that count them."""
    heads = model.heads.items()
    return [name for name, task in heads if takes_factors(type(task)) and log_odds_scale_of(task) is not None]


def find_factors(
    model: VideoLanguageModel,
    training: Split,
    val: Split | None,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    learnt: bool,
    progress: Callable[[], None] = lambda: None,
) -> SharedFactors:
    """The model's, with their weight in the scores of each task; the same on every rank.

    Towers that have learnt put out for their training pairs what they would not for others, so that the factors are too
    sure of themselves by an amount that those pairs do not show. The weight is what suits the validation split;
    without one it is 1, that of log-odds, and the towers must not have `learnt`.

    Raises:
        UserError: there is nothing that says how much they may count, or they are of no use; else as `fit_factors`.
    """
    if val is None and learnt:
        raise UserError("the towers have learnt, and no validation split says how much factors may count")
    factors = fit_factors(model, training, config, ranks, device, progress=progress)
    factors.facts[FACTOR_WEIGHTS] = dict.fromkeys(_tasks(model), 1.0)
    if val is not None:
        plain, rows = without_controls(config), evenly_chosen(JUDGED, len(val))
        scorers = collect(
            model, val, plain, ranks, device, name="val", rows=rows, only=_tasks(model), factors=factors,
            progress=progress,
        )  # fmt: skip
        factors.facts[FACTOR_WEIGHTS] = {name: scorer.factor_weight(GRID) for name, scorer in scorers.items()}
        if not any(factors.facts[FACTOR_WEIGHTS].values()):
            raise UserError("they find no more on the validation split")
    return factors


def evenly_chosen(most: int, among: int) -> list[int]:
    """At most so many of the rows 0 to `among` - 1."""
    return np.linspace(0, among - 1, min(most, among)).astype(int).tolist()


@torch.no_grad()
def fit_factors(
    model: VideoLanguageModel,
    training: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    progress: Callable[[], None] = lambda: None,
) -> SharedFactors:
    """Those of the training split, `emcl.factor_videos` of its videos at most; the same on every rank.

    Each rank encodes its share and keeps those rows in memory; moments are all that is exchanged.

    Raises:
        UserError: too many videos do not decode, too few have captions, or the pairs show nothing that holds for
            others; on all ranks.
    """
    rows = evenly_chosen(config.emcl.factor_videos, len(training))
    pairs = _Pairs(model, training, config, ranks, device)
    with_pairs = encoded_batches(
        model,
        training,
        without_controls(config),
        ranks,
        device,
        {PAIRS: AllCaptions(training)},
        doing="pairs for the shared factors",
        rows=rows,
        with_outputs=True,
        progress=progress,
    )
    for encoded, batch in with_pairs:
        assert encoded.outputs_BW is not None
        pairs.add(encoded.outputs_BW, batch.tasks.get(PAIRS), batch.rows, batch.video_B)
    factors = SharedFactors(bases=config.emcl.factors, seed=config.seed)
    factors.fit_blocks(pairs.blocks, all_reduce=ranks.sum)
    ranks.broadcast_(factors.buffers())  # equal already, but for the last bits on GPUs of different kinds
    factors.facts = ranks.from_first(factors.facts)
    check_fit(factors)
    return factors


class _Pairs:
    """This rank's rows: on the CPU, since they may be many, and block by block on the device."""

    def __init__(
        self, model: VideoLanguageModel, training: Split, config: Config, ranks: Ranks, device: torch.device
    ) -> None:
        lockstep = Lockstep(model, ranks, 4 * config.evaluate.batch_size, device)
        self.evaluation = Evaluation(PAIRS, model, model.backbone, training, config, ranks, device, lockstep)
        widths = model.backbone.image.width, model.backbone.text.width
        none = torch.zeros(0, dtype=torch.long)
        self.kept = [Block(torch.zeros(0, widths[0]), torch.zeros(0, widths[1]), none, none)]
        self.device = exact_device(device)

    def add(
        self, outputs_BW: Tensor, captions: EveryCaption | None, rows: Sequence[int], video_B: Tensor | None
    ) -> None:
        """A batch; a filler has no captions, but takes part in the text tower's passes."""
        text_AW = self.evaluation.text_outputs(captions.text if captions else None)
        if captions is None or video_B is None:
            return
        at = {row: index for index, row in enumerate(rows)}
        owner = torch.tensor([at[row] for row in captions.rows], dtype=torch.long)
        text_AW = text_AW.float().cpu() if captions.text is not None else self.kept[0].text
        self.kept.append(Block(outputs_BW.cpu(), text_AW, owner, video_B.cpu()))

    def blocks(self) -> Iterator[Block]:
        """Of `BATCHES` each: matrices of the rows' width squared are added up for every block."""
        for first in range(0, len(self.kept), BATCHES):
            yield Block(*(rows.to(self.device) for rows in Block.join(self.kept[first : first + BATCHES])))


def save_factors(factors: SharedFactors, export: Path, model: VideoLanguageModel, config: Config) -> None:
    """Beside the weights that they belong to, with the shards that they were fitted on.

    Raises:
        UserError: the file cannot be written.
    """
    sets = [masked(pattern) for pattern in config.data.mixture or [config.data.train]]
    try:
        factors.save(export / FACTORS, sets=sets, model=export_identity(export), towers=hash_of_towers(model.backbone))
    except OSError as error:
        raise UserError(f"{export / FACTORS} is not written ({error.strerror})") from None


def open_factors(export: Path, backbone: Backbone) -> SharedFactors | None:
    """Those of an export, on the CPU; None where it has none.

    Raises:
        UserError: something else is in the file, or another model's.
    """
    path = export / FACTORS
    if not path.is_file():
        return None
    try:
        factors = SharedFactors.load(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    identity = export_identity(export), hash_of_towers(backbone)
    if (factors.facts.get("model"), factors.facts.get("towers")) != identity:
        raise UserError(f"{path} is of another model: without it, the model scores without shared factors")
    return factors
