"""One video and one sentence on the meta device, by which the costs of a backbone are counted."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from emcl.config import Config
from emcl.data.batch import VideoFrames
from emcl.model.backbone import Backbone


def for_one_sample(backbone: Backbone, config: Config) -> tuple[VideoFrames, Tensor]:
    """A video of full length and a sentence of `data.max_tokens`, as the backbone takes them; nothing is computed.

    With `model.cache_features` they are outputs of the towers. The backbone, which is for counting alone, makes no grey
    picture for absent frames from here on: that is one of a batch, and not of each video.
    """
    backbone.config = dataclasses.replace(backbone.config, absent_frames="none")
    data = config.data
    with torch.device("meta"):
        frames = torch.zeros(data.frames, data.image_size, data.image_size, 3, dtype=torch.uint8)
        text = torch.zeros(1, data.max_tokens, dtype=torch.long)
        if config.model.cache_features:
            frames, text = torch.zeros(data.frames, backbone.image.width), torch.zeros(1, backbone.text.width)
        mask_BT = torch.ones(1, data.frames, dtype=torch.bool)
        return VideoFrames(frames=frames, slots=torch.arange(data.frames), mask_BT=mask_BT), text
