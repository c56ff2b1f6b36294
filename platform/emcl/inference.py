"""A trained model for people who only use it: `m = emcl.load("runs/NAME/best")`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from emcl.config import Config, resolve, to_yaml
from emcl.data.decode import DecodeError, decode, square
from emcl.distributed import ALONE
from emcl.distributed import device as default_device
from emcl.errors import UserError
from emcl.model.backbone import Encoded
from emcl.model.pooling import mean_of_frames
from emcl.model.towers import model_json, tokenizer, wants_quick_gelu
from emcl.multitask import VideoLanguageModel
from emcl.train.export import CONFIG, WEIGHTS, find_export, open_export


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
    """Embeds videos and sentences, and compares them as training did.

    Made by `load`. Not thread-safe; nothing is downloaded and no pickle is run.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        config: Config,
        files: Sequence[Path],
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ) -> None:
        """`files` are what the model was read from."""
        self.model, self.config, self.files = model.eval(), config, list(files)
        self.device = torch.device(device) if device is not None else default_device()
        self.model.to(self.device)
        self.batch_size = batch_size
        self._tokenize = tokenizer(self.config.model.name, self.config.data.words)

    @torch.no_grad()
    def encode_video(self, videos: Video | list[Video] | tuple[Video, ...]) -> VideoFeatures:
        """One video or several, each a file or its frames.

        Raises:
            UserError: a file that does not decode, or frames of another shape or type.
        """
        clips = [self._frames(video) for video in (videos if isinstance(videos, list | tuple) else [videos])]
        frames, masks = [], []
        for first in range(0, len(clips), self.batch_size):
            part = clips[first : first + self.batch_size]
            mask = torch.zeros(len(part), self.config.data.frames, dtype=torch.bool)
            for row, clip in enumerate(part):
                mask[row, : len(clip)] = True
            batch = {
                "frames": torch.from_numpy(np.concatenate(part)).to(self.device),
                "frame_slot": mask.flatten().nonzero().squeeze(1).to(self.device),
                "video_mask": mask.to(self.device),
            }
            frames.append(self.model(batch, part="video").cpu())
            masks.append(mask)
        return VideoFeatures(torch.cat(frames), torch.cat(masks))

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Sentences -> (n, D) on the CPU."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.zeros(0, self.model.backbone.embed_dim)
        tokens = self._tokenize(texts).split(4 * self.batch_size)
        return torch.cat([self.model({"text": part.to(self.device)}, part="text").cpu() for part in tokens])

    def similarity(self, text: str | Sequence[str] | Tensor, video: VideoFeatures | Video | list[Video]) -> Tensor:
        """(texts, videos), higher is more alike; sentences and videos, or what `encode_*` gave for them."""
        task = self._task("retrieval", "it has no similarity")
        features = video if isinstance(video, VideoFeatures) else self.encode_video(video)
        embedded = text if isinstance(text, Tensor) else self.encode_text(text)
        scores = task.similarity_in_tiles(
            embedded.to(self.device), features.frames.to(self.device), features.mask.to(self.device),
            self.config.evaluate.tile, ALONE, task.emcl,
        )  # fmt: skip
        return torch.from_numpy(scores)

    @torch.no_grad()
    def caption(self, video: VideoFeatures | Video | list[Video]) -> list[str]:
        """A caption of each video, written as `tasks.captioning.generation` of its run says."""
        task = self._task("captioning", "it writes no captions")
        features = video if isinstance(video, VideoFeatures) else self.encode_video(video)
        parts = zip(features.frames.split(self.batch_size), features.mask.split(self.batch_size), strict=True)
        return [
            text
            for frames, mask in parts
            for text in task.generate(Encoded(frames.to(self.device), mask.to(self.device)))
        ]

    @torch.no_grad()
    def answer(self, video: VideoFeatures | Video, question: str, *, top: int = 1) -> list[tuple[str, float]]:
        """The likeliest answers to a question about one video, with their probabilities."""
        task = self._task("msrvtt_qa", "it answers no questions")
        features = video if isinstance(video, VideoFeatures) else self.encode_video(video)
        encoded = Encoded(features.frames[:1].to(self.device), features.mask[:1].to(self.device))
        tokens = self.model.backbone.encode_tokens(self._tokenize([question]).to(self.device))
        only = torch.zeros(1, dtype=torch.long, device=self.device)
        share = task.head_of_all(encoded, *tokens, only, only)[2].softmax(1)
        best = share[0].topk(min(top, share.shape[1]))
        answers = task.settings.answers
        return [
            (answers[number], value) for number, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def fingerprint(self) -> str:
        """Of weights and settings: what was embedded with one model is compared with no other."""
        digest = hashlib.sha256(to_yaml(self.config).encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _task(self, name: str, otherwise: str) -> Any:
        if name not in self.model.tasks:
            raise UserError(f"{self.files[0].parent} was not trained for {name}, so {otherwise}")
        return self.model.heads[name]

    def _frames(self, video: Video) -> np.ndarray:
        data = self.config.data
        if isinstance(video, (str, Path, Span)):
            span = video if isinstance(video, Span) else Span(Path(video))
            if not span.path.is_file():
                raise UserError(f"{span.path}: no such file")
            try:
                return decode(
                    span.path, frames=data.frames, size=data.size, fps=data.fps, start=span.start, end=span.end
                )
            except DecodeError as error:
                raise UserError(f"{span.path} does not decode: {error}") from None
        frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise UserError(f"frames are (time, height, width, 3) uint8, not {frames.shape} {frames.dtype}")
        chosen = frames
        if len(frames) > data.frames:  # the middle of each of as many equal slices
            chosen = frames[((np.arange(data.frames) + 0.5) * len(frames) / data.frames).astype(int)]
        scaler = VideoReformatter()
        images = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in chosen)
        return np.stack([square(image, data.size, scaler) for image in images])


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
    path: str | Path, *, pretrained: str | Path | None = None, device: str | torch.device | None = None
) -> VideoTextModel:
    """Opens a run's folder or an export of it; or, with `pretrained`, a plain CLIP for zero-shot retrieval.

    Args:
        path: a run; or, with `pretrained`, an open_clip name such as ViT-B-32.
        pretrained: a local checkpoint of OpenAI's or LAION's.

    Raises:
        UserError: no export there, or weights that do not fit.
    """
    if pretrained is not None:
        config = _plain_clip(str(path), Path(pretrained))
        return VideoTextModel(VideoLanguageModel(config), config, [Path(pretrained)], device=device)
    folder = find_export(Path(path))
    model, config = open_export(folder)
    return VideoTextModel(model, config, [folder / WEIGHTS, folder / CONFIG], device=device)


def _plain_clip(name: str, weights: Path) -> Config:
    """A video is the mean of its frames, and nothing was trained on videos."""
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; give a checkpoint of {name}")
    settings = model_json(name)
    size = settings["vision_cfg"].get("image_size", 224)
    words = settings["text_cfg"].get("context_length", 77)
    overrides = [
        f"model.name={name}", f"model.pretrained={weights}", "model.temporal=mean", "emcl.enabled=false",
        f"data.size={size}", f"data.words={words}", "data.frames=12",
        "tasks.retrieval.pooling_temperature=1e6",  # of the pooling by text: so high that it is the mean
    ]  # fmt: skip
    config = resolve(["retrieval"], overrides=overrides)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, quick_gelu=wants_quick_gelu(config.model))
    )
