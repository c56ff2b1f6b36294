"""All combinations of retrieval's inference options on a run's saved embeddings: `emcl options RUN`.

EMCL (none, the model's own layer, the published inference module, compact bases of a training bank), without and with
the model's shared factors, times rescoring of the similarity (none, the dual softmax, QB-Norm by the same bank, those
of installed packages). Only the bank is encoded, once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from emcl.components import RESCORINGS
from emcl.config import Config
from emcl.data.split import open_training_split
from emcl.disk import write_whole
from emcl.distributed import ALONE, device
from emcl.em import EMCL, SharedFactors
from emcl.errors import UserError
from emcl.evaluate.driver import collect, without_controls
from emcl.evaluate.evaluate_settings import EvaluateConfig
from emcl.metrics.rescoring import Rescoring, described, rescoring_of
from emcl.metrics.retrieval_metrics import retrieval_metrics
from emcl.model.backbone import tokenizer_of
from emcl.model.embeddings import Embeddings
from emcl.model.emcl_layer import INFERENCE_MODULE, EMCLLayer
from emcl.model.feature_cache import with_features
from emcl.model.pair_scores import NO_FACTORS, add_ratios, fingerprint_of, weight_of
from emcl.model.pooling import frame_scores, pooling_weights
from emcl.model.regulariser import Regulariser
from emcl.multitask import VideoLanguageModel
from emcl.recipe import parse_overrides
from emcl.registry import task_class
from emcl.run_folder import EMBEDDINGS, OPTIONS, WEIGHTS, RunFolder
from emcl.task.prediction import log_odds_scale_of, only_task
from emcl.tasks.retrieval import RetrievalTask
from emcl.tasks.retrieval_report import OPTION_COLUMNS, Option
from emcl.train.export import open_export
from emcl.train.pair_factors import evenly_chosen, open_factors
from emcl.train.run_config import config_of_run

log = logging.getLogger("emcl")
NONE, SHARED = "none", "shared factors"
"""What tables call them."""
PUBLISHED_MODULE: dict[str, Any] = {"bases": 7, "iterations": 10, "temperature": 0.1, "beta": 4.0}
"""EMCL as an inference module on a trained model, as published for CLIP2Video."""

Score = Callable[[Tensor, Tensor, Tensor], NDArray[np.float32]]
"""texts (Q, D), frames (G, T, D), mask (G, T) -> (Q, G)"""


OPTION_SETTINGS = ("evaluate.tile", "evaluate.dsl_temperature", "evaluate.rescoring", "evaluate.rescoring_options")
"""The settings that change an option."""


def every_option(
    run: Path, overrides: Sequence[str] = (), *, task: str | None = None, bank_videos: int = 500
) -> list[Option]:
    """Scores all combinations and saves them in the run's folder.

    Args:
        overrides: `key=value` of `OPTION_SETTINGS`; the chosen rescoring gets the options.
        task: which of the run's tasks, if several are retrieval.

    Raises:
        UserError: no export, no retrieval in it, no kept embeddings, or an override that is none.
    """
    for key, _ in parse_overrides(overrides):
        if not any(f"{key}.".startswith(f"{one}.") for one in OPTION_SETTINGS):
            raise UserError(f"{key} changes no option here: {', '.join(OPTION_SETTINGS)} do")
    folder = RunFolder.open(run)
    folder.check_written()
    export = folder.export
    saved = config_of_run(None, None, overrides, evaluate=run, resumed=None)
    rescorings = _rescorings(saved.evaluate)
    able = [name for name in saved.tasks if issubclass(task_class(saved.kind_of(name)), RetrievalTask)]
    name = only_task(run, able, task, "retrieve, which these options are for", "--task, task=")
    alias = saved.alias_of(name)
    test = Embeddings.open(folder.kept(EMBEDDINGS, "test", alias=alias))
    model, config = open_export(export)
    target = device()
    model.to(target)
    factors = _factors(export, model, test, name)
    kept = folder.kept(EMBEDDINGS, "bank", alias=alias)
    bank = _bank(export, kept, model, config, name, factors, bank_videos, target)
    scale = log_odds_scale_of(model.heads[name])
    ratio_scale = scale / weight_of(factors, name) if factors is not None and scale is not None else None
    options = list(_combinations(model.heads[name], saved.evaluate.tile, rescorings, test, bank, ratio_scale, target))
    as_json = json.dumps([dataclasses.asdict(option) for option in options], indent=1)
    write_whole(folder.kept(OPTIONS, "test", alias=alias), as_json)
    return options


def _factors(export: Path, model: VideoLanguageModel, test: Embeddings, task: str) -> SharedFactors | None:
    """Those of the model, if the kept embeddings were made with them."""
    factors = open_factors(export, model.backbone)
    return factors if test.factors != NO_FACTORS and test.factors == fingerprint_of(factors) else None


def _bank(
    export: Path,
    kept: Path,
    model: VideoLanguageModel,
    config: Config,
    task: str,
    factors: SharedFactors | None,
    videos: int,
    target: torch.device,
) -> Embeddings:
    """Training videos, evenly chosen, with all their captions; reuses a saved bank of the same videos and weights."""
    training = open_training_split(config.data, config.seed, tokenizer_of(config))
    rows = evenly_chosen(videos, len(training))
    with (export / WEIGHTS).open("rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").hexdigest()
    if kept.is_file():
        bank = Embeddings.open(kept)
        same = (bank.model, bank.factors) == (weights, fingerprint_of(factors))
        if same and bank.videos == [training.sample(row).id for row in rows]:
            return bank
    training = with_features(training, config, model.backbone, ALONE, target)
    config = without_controls(config)
    scorers = collect(
        model, training, config, ALONE, target, name="the query bank", rows=rows, only=[task], factors=factors
    )
    scorer: Any = scorers[task]
    bank = dataclasses.replace(scorer.embeddings()[0], model=weights)
    bank.save(kept)
    return bank


def _combinations(
    task: Any,
    tile: int,
    rescorings: Sequence[tuple[str, Rescoring]],
    test: Embeddings,
    bank: Embeddings,
    scale: float | None,
    target: torch.device,
) -> Iterator[Option]:
    """`scale` is what the ratios of shared factors are divided by; None without any."""
    layers = _layers(task, tile, bank)
    for name, (score, in_tiles) in tqdm(layers.items(), desc="inference options", unit="layer", leave=False):
        text, frames, mask = (tensor.to(target) for tensor in (test.text, test.frames, test.mask))
        similarity = score(text, frames, mask)
        by_text = score(bank.text.to(target), frames, mask)
        by_video = score(text, bank.frames.to(target), bank.mask.to(target))
        for with_factors in (False, True)[: 1 if scale is None else 2]:
            if with_factors and scale is not None:
                _add(similarity, test, test, scale)
                _add(by_text, bank, test, scale)
                _add(by_video, test, bank, scale)
            for label, rescoring in rescorings:
                both = partial(rescoring, bank_BG=by_text), partial(rescoring, bank_BG=by_video.T)
                metrics = retrieval_metrics(similarity, test.owner, rescore=both)
                named = f"{name} + {SHARED}" if with_factors and name != NONE else SHARED if with_factors else name
                yield Option(named, label, in_tiles or rescoring.transductive, metrics)


def _add(scores_QG: NDArray[np.float32], texts: Embeddings, videos: Embeddings, scale: float) -> None:
    assert texts.text_factors is not None and videos.video_factors is not None
    add_ratios(scores_QG, texts.text_factors, videos.video_factors, scale)


def _rescorings(evaluate: EvaluateConfig) -> list[tuple[str, Rescoring]]:
    """All that there are, with what tables call them; with settings of its own the one that is chosen.

    Another package's that cannot be used is left out with a line that says why.
    """
    options: dict[str, Mapping[str, str]] = {"dsl": {"temperature": str(evaluate.dsl_temperature)}}
    options |= {evaluate.rescoring: evaluate.rescoring_options}
    usable = []
    for name in RESCORINGS.names():
        try:
            rescoring = rescoring_of(name, options.get(name))
        except UserError as error:
            if name == evaluate.rescoring:
                raise
            log.warning("left out: %s", error)
            continue
        usable.append((described(name, rescoring), rescoring))
    return usable


def _layers(task: Any, tile: int, bank: Embeddings) -> dict[str, tuple[Score, bool]]:
    """Similarity functions by name, and whether each is transductive."""

    def through(layer: Regulariser | None) -> Score:
        return lambda text, frames, mask: task.similarity_in_tiles(text, frames, mask, tile, ALONE, layer)

    def published(text: Tensor, frames: Tensor, mask: Tensor) -> NDArray[np.float32]:
        return reference_module(text, frames, mask, pooling=task.settings.pooling_temperature, tile=tile)

    layers: dict[str, tuple[Score, bool]] = {NONE: (through(None), False)}
    if task.emcl is not None:
        layers[f"its own ({task.emcl.label})"] = (through(task.emcl), task.emcl.transductive)
    settings = {**INFERENCE_MODULE, "bases": min(INFERENCE_MODULE["bases"], bank.text.shape[1])}
    fitted = EMCLLayer(variant="compact", **settings).fit(bank.video_means, bank.text).eval()
    layers["compact at inference, bases of the bank"] = (through(fitted.to(task.logit_scale.device)), False)
    layers["reference at inference"] = (published, True)
    return layers


@torch.no_grad()
def reference_module(
    text_QD: Tensor, frames_GTD: Tensor, mask_GT: Tensor, *, pooling: float, tile: int, **settings: Any
) -> NDArray[np.float32]:
    """The published inference module, (Q, G): EM over the unit rows of each tile of texts and videos.

    Args:
        pooling: temperature of the text-conditioned pooling.
        settings: of the layer, in place of the published K, T, lambda and beta.
    """
    layer = EMCL(**{**PUBLISHED_MODULE, **settings}).eval().to(text_QD.device)
    scores_QG = np.empty((len(text_QD), len(frames_GTD)), np.float32)
    for first in range(0, len(text_QD), tile):
        for start in range(0, len(frames_GTD), tile):
            texts, videos = slice(first, first + tile), slice(start, start + tile)
            text_AD, frames_BTD, mask_BT = text_QD[texts], frames_GTD[videos], mask_GT[videos]
            weights_ABT = pooling_weights(frame_scores(text_AD, frames_BTD), mask_BT, pooling)
            pooled_ABD = F.normalize(torch.einsum("abt,btd->abd", weights_ABT, frames_BTD), dim=-1)
            corrected, corrected_text = layer(pooled_ABD.flatten(0, 1), F.normalize(text_AD, dim=1))
            cosine_AB = F.cosine_similarity(corrected.view_as(pooled_ABD), corrected_text[:, None], dim=-1)
            scores_QG[texts, videos] = cosine_AB.cpu().numpy()
    return scores_QG


def table(options: list[Option]) -> str:
    """As Markdown."""
    rows = [OPTION_COLUMNS, ["---"] * len(OPTION_COLUMNS), *(option.cells() for option in options)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
