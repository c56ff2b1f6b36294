"""A trained model for people who only use it: `m = emcl.load("runs/NAME/best")`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config, fingerprint_text
from emcl.data.batch import videos_of
from emcl.devices import Devices, choose_devices
from emcl.distributed import ALONE
from emcl.em import SharedFactors
from emcl.errors import UserError
from emcl.features import TextFeatures, VideoFeatures
from emcl.given_videos import Video, frames_of_given
from emcl.model.backbone import Encoded
from emcl.model.emcl_layer import INFERENCE_MODULE, EMCLLayer
from emcl.model.pair_scores import FACTOR_WEIGHTS, add_ratios, check_fit, weight_of
from emcl.multitask import VideoLanguageModel
from emcl.prefetch import in_order
from emcl.run_folder import CONFIG, WEIGHTS, RunFolder
from emcl.task import Compares, Offer, Prediction
from emcl.task.prediction import COMPARE, compares, log_odds_scale_of, only_task
from emcl.train.export import open_export
from emcl.train.pair_factors import open_factors
from emcl.train.plain_clip import plain_clip


class QuestionError(UserError):
    """A question is missing for a task that needs one, or given for a task that takes none."""


class VideoTextModel:
    """Embeds videos and sentences, compares them as in training, and gives its tasks' predictions for a video.

    Made by `load`. Not thread-safe; nothing is downloaded and no pickle is run.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        config: Config,
        files: Sequence[Path],
        *,
        factors: SharedFactors | None = None,
        devices: Devices | None = None,
        batch_size: int = 16,
        compare_by: str | None = None,
    ) -> None:
        """`files` are what the model was read from; `compare_by` is the task by which it compares, if several can.

        `factors` are the shared ones that it compares by too, with their weights.

        Raises:
            UserError: it does not compare by that task.
        """
        self.config, self.files, self.batch_size = config, list(files), batch_size
        self.devices = devices or choose_devices()
        self.replicas = self.devices.replicas(model.eval())
        self.model, self.device = self.replicas[0], self.devices.first
        self.module: EMCLLayer | None = None
        """The compact EMCL as an inference module, see `fit_emcl`."""
        self.factors = factors
        """On the CPU; see `fit_factors`."""
        self._compare_by = compare_by
        if compare_by is not None:
            self._comparing()

    @property
    def offers(self) -> dict[str, Offer]:
        """The predictions that its tasks offer, by the tasks' names."""
        return {name: task.offer for name, task in self.model.heads.items() if task.offer is not None}

    def encode_video(
        self, videos: Video | list[Video] | tuple[Video, ...], *, progress: bool | None = None
    ) -> VideoFeatures:
        """One video or several, each a file or its frames: decoded by threads while the batches before are encoded, on
        all GPUs.

        Args:
            progress: whether a bar is shown; where not given, for more videos than two batches.

        Raises:
            UserError: a file that does not decode, or frames of another shape or type.
        """
        listed = list(videos) if isinstance(videos, list | tuple) else [videos]
        hidden = not progress if progress is not None else len(listed) <= 2 * self.batch_size
        encoded = []
        with tqdm(total=len(listed), desc="encoding", unit="video", disable=hidden, leave=False) as bar:
            for batch in self._encoded(listed):
                encoded.append(batch)
                bar.update(len(batch))
        if not encoded:
            backbone = self.model.backbone
            empty = torch.zeros(0, self.config.data.frames, backbone.embed_dim)
            none = torch.zeros(empty.shape[:2], dtype=torch.bool), torch.zeros(0, backbone.image.width)
            return VideoFeatures(empty, *none)
        return VideoFeatures.join(encoded)

    def _encoded(self, videos: Sequence[Video]) -> Iterator[VideoFeatures]:
        """Batch by batch; only batches in progress are in memory."""
        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as decoders,
            ThreadPoolExecutor(len(self.replicas)) as encoders,
        ):
            clips = in_order(
                (decoders.submit(frames_of_given, video, self.config.data) for video in videos), 2 * self.batch_size
            )
            batches = iter(lambda: list(islice(clips, self.batch_size)), [])
            if len(self.replicas) == 1:
                yield from (self._encode(self.model, batch) for batch in batches)
                return
            work = (
                encoders.submit(self._encode, replica, batch)
                for replica, batch in zip(cycle(self.replicas), batches, strict=False)
            )
            yield from in_order(work, len(self.replicas))

    @torch.no_grad()
    def _encode(self, model: VideoLanguageModel, clips: list[np.ndarray]) -> VideoFeatures:
        device = next(model.parameters()).device
        videos = videos_of(clips, self.config.data.frames)
        with self._precision():
            frames_BTD, outputs_BW = model.backbone.encode_video_with_outputs(videos.to(device))
        return VideoFeatures(frames_BTD.float().cpu(), videos.mask_BT, outputs_BW.cpu())

    def _precision(self) -> Any:
        kind = self.devices.dtype
        return nullcontext() if kind == torch.float32 else torch.autocast(self.device.type, kind)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Sentences -> (n, D) on the CPU."""
        return self.encode_queries(texts).embeddings

    @torch.no_grad()
    def encode_queries(self, texts: str | Sequence[str]) -> TextFeatures:
        """Sentences -> all by which `similarity` compares them, to be used for several collections of videos."""
        texts, backbone = [texts] if isinstance(texts, str) else list(texts), self.model.backbone
        if not texts:
            return TextFeatures(torch.zeros(0, backbone.embed_dim), torch.zeros(0, backbone.text.width))
        embeddings, outputs = [], []
        with self._precision():
            for tokens in backbone.tokenize(texts).split(4 * self.batch_size):
                rows = backbone.text_outputs(tokens)
                embeddings.append(backbone.encode_text(rows).float().cpu())
                outputs.append(rows.float().cpu())
        return TextFeatures(torch.cat(embeddings), torch.cat(outputs))

    def fit_emcl(self, videos: VideoFeatures, texts: Tensor | None = None, **settings: Any) -> VideoTextModel:
        """Fits the compact EMCL to a collection; `similarity` compares corrected features from then on.

        For a model that has no EMCL of its own, such as a plain CLIP. Each query is still scored independently.

        Args:
            videos: of the collection.
            texts: sentences of its kind (n, D), where there are any.
            settings: of the layer, in place of those of `emcl options`.

        Raises:
            UserError: the model has an EMCL layer.
        """
        self.check_no_emcl()
        width = self.model.backbone.embed_dim
        chosen = {**INFERENCE_MODULE, "bases": min(INFERENCE_MODULE["bases"], width), **settings}
        self.module = EMCLLayer(variant="compact", **chosen).fit(videos.mean(), texts).eval().to(self.device)
        return self

    def fit_factors(
        self,
        videos: VideoFeatures,
        texts: TextFeatures | Sequence[str],
        owner: Any = None,
        *,
        group: Any = None,
        **settings: Any,
    ) -> VideoTextModel:
        """Finds the factors that videos and their sentences share; `similarity` counts them from then on.

        For a model that has not learnt these very pairs, such as a plain CLIP: what it puts out for those that it has
        says too much. They replace factors of the model's own. Each query is still scored independently.

        Args:
            texts: any number for a video.
            owner: each text's video, as its row; by default text i belongs to video i.
            group: a number for each video, the same for those that show nearly the same, such as parts of one film.
            settings: of `emcl.SharedFactors`, such as `bases`.

        Raises:
            UserError: pairs that are too few or show nothing, or the task by which it compares has no log-odds.
        """
        name = self.check_takes_factors()
        texts = texts if isinstance(texts, TextFeatures) else self.encode_queries(texts)
        try:
            rows = videos.needed_outputs(), texts.needed_outputs()
            factors = SharedFactors(**settings).fit(*rows, owner, group=group)
        except ValueError as error:
            raise UserError(str(error)) from None
        check_fit(factors)
        factors.facts[FACTOR_WEIGHTS] = {name: 1.0}
        self.factors = factors
        return self

    def check_takes_factors(self) -> str:
        """The task by which it compares.

        Raises:
            UserError: there is none, or several and none is named, or its scores are no log-odds.
        """
        name = self._comparing_by()
        if log_odds_scale_of(self.model.heads[name]) is None:
            raise UserError(f"{name} compares by scores that are no log-odds, to which no shared factors add")
        return name

    def check_no_emcl(self) -> None:
        """Raises UserError: the model has EMCL or another regulariser of its own, so that none can be fitted to it."""
        own = self._comparing().emcl
        if own is not None:
            what = "an EMCL layer" if isinstance(own, EMCLLayer) else f"a regulariser ({own.label})"
            raise UserError(f"{self.files[0].parent} was trained with {what} of its own")

    def similarity(
        self, text: str | Sequence[str] | TextFeatures | Tensor, video: VideoFeatures | Video | list[Video]
    ) -> Tensor:
        """(texts, videos), higher is more alike; sentences and videos, or what `encode_*` gave for them.

        Raises:
            UserError: no task compares, or several and `load` was not told which; or embeddings alone, as of
                `encode_text`, for a model with shared factors.
        """
        task = self._comparing()
        features = self._features(video)
        if isinstance(text, Tensor):
            text = TextFeatures(text)
        texts = text if isinstance(text, TextFeatures) else self.encode_queries(text)
        scores = task.similarity_in_tiles(
            texts.embeddings.to(self.device), features.frames.to(self.device), features.mask.to(self.device),
            self.config.evaluate.tile, ALONE, task.emcl if self.module is None else self.module,
        )  # fmt: skip
        if (counting := self.counting_factors()) is not None:
            factors, scale = counting
            add_ratios(scores, texts.factor_vectors(factors), features.factor_vectors(factors), scale)
        return torch.from_numpy(scores)

    def counting_factors(self) -> tuple[SharedFactors, float] | None:
        """The shared factors by which it compares too, and what their log-likelihood ratio is divided by to be added to
        cosines; None if it has none.

        Raises:
            UserError: as `similarity`.
        """
        if self.factors is None:
            return None
        name = self._comparing_by()
        scale = log_odds_scale_of(self.model.heads[name])
        if scale is None or not (weight := weight_of(self.factors, name)):
            return None
        return self.factors, scale / weight

    @torch.no_grad()
    def predict(
        self,
        video: VideoFeatures | Video | list[Video],
        question: str | None = None,
        *,
        task: str | None = None,
        verb: str | None = None,
        top: int = 1,
    ) -> list[list[Prediction]]:
        """A task's predictions for each video, the likeliest first.

        Args:
            question: for a task that is asked one (see `offers`).
            task: by name; not needed if only one fits.
            verb: restricts to tasks with this verb, such as `caption`.
            top: predictions of a video at most; some tasks have only one.

        Raises:
            UserError: no task fits, or several do; `top` below 1; or a file that does not decode.
            QuestionError: the task needs a question and there is none, or takes none and there is one.
        """
        head = self.model.heads[self.task_for(task, verb, question=question)]
        if top < 1:
            raise UserError(f"top={top}: one prediction of a video at least")
        features = self._features(video)
        if not len(features):
            return []
        batches = zip(features.frames.split(self.batch_size), features.mask.split(self.batch_size), strict=True)
        predictions: list[list[Prediction]] = []
        with self._precision():
            for frames, mask in batches:
                encoded = Encoded(frames.to(self.device), mask.to(self.device))
                predictions += head.predict(self.model.backbone, encoded, question, top=top)
        if not all(predictions):
            raise ValueError(f"{type(head).__name__}.predict gave nothing for a video")
        return predictions

    def caption(self, video: VideoFeatures | Video | list[Video], *, task: str | None = None) -> list[str]:
        """A caption of each video, generated by the task's `generation` settings.

        Raises:
            UserError: as `predict`, by tasks that caption.
        """
        return [best.text for best, *_ in self.predict(video, task=task, verb="caption")]

    def answer(
        self, video: VideoFeatures | Video, question: str, *, top: int = 1, task: str | None = None
    ) -> list[tuple[str, float | None]]:
        """The likeliest answers to a question about one video, with their probabilities, where the task gives any.

        Raises:
            UserError, QuestionError: as `predict`, by tasks that answer.
        """
        task = self.task_for(task, "answer", question=question)  # before the video is encoded
        features = self._features(video)
        only = VideoFeatures(features.frames[:1], features.mask[:1])
        (answers,) = self.predict(only, question, task=task, top=top)
        return [(answer.text, answer.probability) for answer in answers]

    def task_for(self, task: str | None = None, verb: str | None = None, *, question: str | None) -> str:
        """The selected task among those that predict (with this `verb`); arguments as `predict`.

        Raises:
            UserError, QuestionError: as `predict`.
        """
        able = {name: offer for name, offer in self.offers.items() if verb in (None, offer.verb)}
        name = only_task(
            self._run, list(able), task, verb or "say something about a video", "--task, task= or /api/predict/TASK"
        )
        example = able[name].question
        if example is not None and not (question or "").strip():
            raise QuestionError(f"{name} is asked a question, such as {example!r}, and there is none")
        if example is None and question is not None:
            raise QuestionError(f"{name} is asked no question ({able[name].description})")
        return name

    def fingerprint(self) -> str:
        """Hash of weights and settings, so that embeddings of different models are never compared."""
        digest = hashlib.sha256(fingerprint_text(self.config).encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def check_compare_by(self) -> None:
        """Raises UserError: several tasks could compare, and none is named; it is no error if none can."""
        if self._able_to_compare():
            self._comparing()

    def _able_to_compare(self) -> list[str]:
        return [name for name, task in self.model.heads.items() if compares(task)]

    def _comparing_by(self) -> str:
        """The task by which sentences and videos are compared.

        Raises:
            UserError: none is able to, or several and none is named.
        """
        able = self._able_to_compare()
        return only_task(self._run, able, self._compare_by, COMPARE, "--task, or task= of emcl.load")

    def _comparing(self) -> Compares:
        task = self.model.heads[self._comparing_by()]
        assert compares(task)
        return task

    @property
    def _run(self) -> Path:
        return self.files[0].parent

    def _features(self, video: VideoFeatures | Video | list[Video]) -> VideoFeatures:
        return video if isinstance(video, VideoFeatures) else self.encode_video(video)


def load(
    path: str | Path,
    *,
    pretrained: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    task: str | None = None,
    factors: bool = True,
) -> VideoTextModel:
    """Opens a run's folder or an export of it; or, with `pretrained`, a plain CLIP for zero-shot retrieval.

    Args:
        path: a run; or, with `pretrained`, an open_clip name such as ViT-B-32.
        pretrained: a local checkpoint of OpenAI's or LAION's.
        device: one device; all GPUs where not given, the CPU where there is none.
        precision: `fp32`, `bf16` or `fp16`; where not given, fp32 on a CPU and elsewhere what the run was trained in
            (`fp16` for `clip_fp16`).
        task: the one by which sentences and videos are compared, of a run with several that do.
        factors: whether it compares by its shared factors too, if it has any.

    Raises:
        UserError: no export there, or weights that do not fit, or the run does not compare by `task`.
    """
    if pretrained is not None:
        devices, config = choose_devices(device, precision), plain_clip(str(path), Path(pretrained))
        return VideoTextModel(VideoLanguageModel(config), config, [Path(pretrained)], devices=devices, compare_by=task)
    folder = RunFolder.open(Path(path)).export
    model, config = open_export(folder)
    devices = choose_devices(device, precision, trained=config.precision)
    shared = open_factors(folder, model.backbone) if factors else None
    files = [folder / WEIGHTS, folder / CONFIG]
    return VideoTextModel(model, config, files, factors=shared, devices=devices, compare_by=task)
