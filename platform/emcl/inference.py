"""A trained model for people who only use it: `m = emcl.load("runs/NAME/best")`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config, fingerprint_text
from emcl.data.batch import videos_of
from emcl.data.decode import DecodeError, decode_as, evenly
from emcl.data.frame_shapes import evaluated_shape
from emcl.devices import Devices, choose_devices
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.model.backbone import Encoded
from emcl.model.emcl_layer import INFERENCE_MODULE, EMCLLayer
from emcl.model.pooling import mean_of_frames
from emcl.multitask import VideoLanguageModel
from emcl.prefetch import in_order
from emcl.run_folder import CONFIG, WEIGHTS, RunFolder
from emcl.task import Compares, Offer, Prediction
from emcl.task.prediction import COMPARE, compares, only_task
from emcl.train.export import open_export
from emcl.train.plain_clip import plain_clip


class QuestionError(UserError):
    """A question is missing for a task that needs one, or given for a task that takes none."""


class VideoError(UserError):
    """A file that does not decode."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} does not decode: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Span:
    """A part of a file."""

    path: Path
    start: float | None = None
    """Seconds; from the file's start to its end where not given."""
    end: float | None = None


Video = str | Path | Span | np.ndarray | Tensor
"""A file or a part of one, or its frames (time, height, width, 3) uint8."""


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
        devices: Devices | None = None,
        batch_size: int = 16,
        compare_by: str | None = None,
    ) -> None:
        """`files` are what the model was read from; `compare_by` is the task by which it compares, if several can.

        Raises:
            UserError: it does not compare by that task.
        """
        self.config, self.files, self.batch_size = config, list(files), batch_size
        self.devices = devices or choose_devices()
        self.replicas = self.devices.replicas(model.eval())
        self.model, self.device = self.replicas[0], self.devices.first
        self.module: EMCLLayer | None = None
        """The compact EMCL as an inference module, see `fit_emcl`."""
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
            empty = torch.zeros(0, self.config.data.frames, self.model.backbone.embed_dim)
            return VideoFeatures(empty, torch.zeros(empty.shape[:2], dtype=torch.bool))
        return VideoFeatures(
            torch.cat([batch.frames for batch in encoded]), torch.cat([batch.mask for batch in encoded])
        )

    def _encoded(self, videos: Sequence[Video]) -> Iterator[VideoFeatures]:
        """Batch by batch; only batches in progress are in memory."""
        with (
            ThreadPoolExecutor(os.cpu_count() or 1) as decoders,
            ThreadPoolExecutor(len(self.replicas)) as encoders,
        ):
            clips = in_order((decoders.submit(self._frames, video) for video in videos), 2 * self.batch_size)
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
            frames_BTD = model.backbone.encode_video(videos.to(device))
        return VideoFeatures(frames_BTD.float().cpu(), videos.mask_BT)

    def _precision(self) -> Any:
        kind = self.devices.dtype
        return nullcontext() if kind == torch.float32 else torch.autocast(self.device.type, kind)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Sentences -> (n, D) on the CPU."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.zeros(0, self.model.backbone.embed_dim)
        backbone = self.model.backbone
        chunks = backbone.tokenize(texts).split(4 * self.batch_size)
        with self._precision():
            return torch.cat([backbone.encode_text(tokens).float().cpu() for tokens in chunks])

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

    def check_no_emcl(self) -> None:
        """Raises UserError: the model has EMCL or another regulariser of its own, so that none can be fitted to it."""
        own = self._comparing().emcl
        if own is not None:
            what = "an EMCL layer" if isinstance(own, EMCLLayer) else f"a regulariser ({own.label})"
            raise UserError(f"{self.files[0].parent} was trained with {what} of its own")

    def similarity(self, text: str | Sequence[str] | Tensor, video: VideoFeatures | Video | list[Video]) -> Tensor:
        """(texts, videos), higher is more alike; sentences and videos, or what `encode_*` gave for them.

        Raises:
            UserError: no task compares, or several and `load` was not told which.
        """
        task = self._comparing()
        features = self._features(video)
        embedded = text if isinstance(text, Tensor) else self.encode_text(text)
        scores = task.similarity_in_tiles(
            embedded.to(self.device), features.frames.to(self.device), features.mask.to(self.device),
            self.config.evaluate.tile, ALONE, task.emcl if self.module is None else self.module,
        )  # fmt: skip
        return torch.from_numpy(scores)

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

    def _comparing(self) -> Compares:
        """The task by which sentences and videos are compared.

        Raises:
            UserError: none is able to, or several and none is named.
        """
        task = self.model.heads[
            only_task(self._run, self._able_to_compare(), self._compare_by, COMPARE, "--task, or task= of emcl.load")
        ]
        assert compares(task)
        return task

    @property
    def _run(self) -> Path:
        return self.files[0].parent

    def _features(self, video: VideoFeatures | Video | list[Video]) -> VideoFeatures:
        return video if isinstance(video, VideoFeatures) else self.encode_video(video)

    def _frames(self, video: Video) -> np.ndarray:
        data = self.config.data
        shape = evaluated_shape(data)
        if isinstance(video, (str, Path, Span)):
            span = video if isinstance(video, Span) else Span(Path(video))
            if not span.path.is_file():
                raise UserError(f"{span.path}: no such file")
            try:
                return decode_as(data, span.path, start=span.start, end=span.end, shape=shape)
            except DecodeError as error:
                raise VideoError(span.path, str(error)) from None
        frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise UserError(f"frames are (time, height, width, 3) uint8, not {frames.shape} {frames.dtype}")
        chosen = frames
        if len(frames) > data.frames:
            chosen = frames[evenly(len(frames), data.frames, data.sampling)]
        return np.stack([shape(av.VideoFrame.from_ndarray(frame, format="rgb24")) for frame in chosen])


class VideoFeatures:
    """Frame embeddings of some videos: `frames` (n, T, D) and `mask` (n, T), on the CPU."""

    def __init__(self, frames: Tensor, mask: Tensor) -> None:
        self.frames, self.mask = frames, mask

    def __len__(self) -> int:
        return len(self.frames)

    def mean(self) -> Tensor:
        """One vector a video (n, D): the mean of its frames."""
        return mean_of_frames(self.frames, self.mask)


def load(
    path: str | Path,
    *,
    pretrained: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    task: str | None = None,
) -> VideoTextModel:
    """Opens a run's folder or an export of it; or, with `pretrained`, a plain CLIP for zero-shot retrieval.

    Args:
        path: a run; or, with `pretrained`, an open_clip name such as ViT-B-32.
        pretrained: a local checkpoint of OpenAI's or LAION's.
        device: one device; all GPUs where not given, the CPU where there is none.
        precision: `fp32`, `bf16` or `fp16`; where not given, fp32 on a CPU and elsewhere what the run was trained in
            (`fp16` for `clip_fp16`).
        task: the one by which sentences and videos are compared, of a run with several that do.

    Raises:
        UserError: no export there, or weights that do not fit, or the run does not compare by `task`.
    """
    if pretrained is not None:
        devices, config = choose_devices(device, precision), plain_clip(str(path), Path(pretrained))
        return VideoTextModel(VideoLanguageModel(config), config, [Path(pretrained)], devices=devices, compare_by=task)
    folder = RunFolder.open(Path(path)).export
    model, config = open_export(folder)
    devices = choose_devices(device, precision, trained=config.precision)
    return VideoTextModel(model, config, [folder / WEIGHTS, folder / CONFIG], devices=devices, compare_by=task)
