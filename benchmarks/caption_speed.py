"""Captions per second with beam size 5: with the key-value cache, without it, and one video at a time.

A decoder of GPT-2 blocks (4 layers, width 256, 5,000 tokens) on the features of 16 videos of 12 frames; 20 new tokens
each. The weights are random, so hardly any caption ends early.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from emcl.model.caption_decoder import CaptionDecoder
from emcl.model.model_settings import Generation
from timing import Row, alternate, compared, script

VIDEOS, FRAMES, WIDTH, TOKENS, LENGTH = 16, 12, 512, 5000, 20


def measure(repeats: int) -> list[Row]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = CaptionDecoder(
        WIDTH, size=TOKENS, width=256, layers=4, heads=4, positions=64, dropout=0.0, ends=(2, 0, 1)
    )
    decoder = decoder.to(device).eval()
    frames = torch.randn(VIDEOS, FRAMES, WIDTH, device=device)
    mask = torch.ones(VIDEOS, FRAMES, dtype=torch.bool, device=device)
    cached = Generation(num_beams=5, max_new_tokens=LENGTH)
    plain = dataclasses.replace(cached, use_cache=False)

    def rate(how: Generation, batch: int) -> float:
        began = time.perf_counter()
        for first in range(0, VIDEOS, batch):
            decoder.generate(frames[first : first + batch], mask[first : first + batch], how)
        return VIDEOS / (time.perf_counter() - began)

    sides = {
        "ours": lambda: rate(cached, VIDEOS),
        "without the cache": lambda: rate(plain, VIDEOS),
        "one at a time": lambda: rate(cached, 1),
    }
    rate(cached, VIDEOS)
    return [compared("captions", "beam 5, 16 videos", "captions/s", alternate(sides, repeats))]


if __name__ == "__main__":
    script(__doc__, measure, "captions")
