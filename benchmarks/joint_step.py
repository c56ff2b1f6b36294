"""Cost of a joint step of all tasks compared with a step of each task alone: `make joint-step`.

ViT-B-32 with random weights, 12 frames, one caption and one question per video; forward, backward and AdamW in fp32.
The four alternate in one process and medians are compared; peak memory is measured in separate processes. The captions
use 5,000 of CLIP's tokens, so the decoder's vocabulary has the size of a real data set's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from emcl.config import resolve
from emcl.data.captions import Tokens
from emcl.data.loader import Collate, Loaded
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.model.backbone import tokenizer_of
from emcl.multitask import VideoLanguageModel, collators, total_loss
from emcl.registry import task_class

TASKS = ("retrieval", "captioning", "msrvtt_qa")
FRAMES, WORDS, TOKENS, CAPTION, ANSWERS = 12, 32, 5000, 10, 1500
OUT = Path("benchmarks/results/joint_step.json")


def samples_of(count: int) -> list[Sample]:
    from open_clip.tokenizer import SimpleTokenizer

    clip, rng = SimpleTokenizer(), random.Random(0)

    def words(number: int) -> str:
        return clip.decode([rng.randrange(1000, 1000 + TOKENS) for _ in range(number)])

    known = [
        Sample(id=str(row), captions=[words(CAPTION)], qa=[{"question": words(7), "answer": f"a{row}"}])
        for row in range(max(ANSWERS, count))
    ]
    known[-1].captions.append(clip.decode(range(1000, 1000 + TOKENS)))
    return known


def stepper(tasks: tuple[str, ...], videos: int, device: torch.device) -> Callable[[], None]:
    """Returns a training step of these tasks on a fixed batch."""
    known = samples_of(videos)
    config = resolve(tasks, overrides=["model.name=ViT-B-32", "data.image_size=224", f"data.max_tokens={WORDS}"])
    learnt = {name: task_class(name).learn_settings(item, config, known) for name, item in config.tasks.items()}
    config = dataclasses.replace(config, tasks=learnt)
    texts = Tokens(tokenizer_of(config))
    task_collators = collators(config, texts, training=True)
    rng = np.random.default_rng(0)
    items = [
        Loaded(Draw(row, None, row), known[row], rng.integers(0, 256, (FRAMES, 224, 224, 3), dtype=np.uint8))
        for row in range(videos)
    ]
    batch = Collate(task_collators, frames=FRAMES)(items).to(device)
    torch.manual_seed(0)
    model = VideoLanguageModel(config, load_weights=False).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step() -> None:
        total_loss(model(batch=batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak(tasks: tuple[str, ...], videos: int, device: torch.device) -> float:
    """Peak memory in GiB after two steps."""
    step = stepper(tasks, videos, device)
    step()
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=4, help="a step's batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.peak:
        print(peak(tuple(options.peak.split(",")), options.videos, device))
        return
    sets = [(name,) for name in TASKS] + [TASKS]
    memory = {}
    for tasks in sets:
        command = [sys.executable, __file__, "--videos", str(options.videos), "--peak", ",".join(tasks)]
        memory[tasks] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    steps = {tasks: stepper(tasks, options.videos, device) for tasks in sets}
    seconds: dict[tuple[str, ...], list[float]] = {tasks: [] for tasks in sets}
    for repeat in range(options.repeats + 1):
        for tasks, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:  # the first is a warm-up
                seconds[tasks].append(time.perf_counter() - began)
    medians = {tasks: statistics.median(values) for tasks, values in seconds.items()}
    costliest = max(medians[tasks] for tasks in sets[:-1])
    print(f"{options.videos} videos of {FRAMES} frames, ViT-B-32, {device.type}, median of {options.repeats}")
    for tasks in sets:
        spread = max(seconds[tasks]) - min(seconds[tasks])
        print(f"{'+'.join(tasks):<34}{medians[tasks]:7.2f} s (spread {spread:.2f}) {memory[tasks]:7.2f} GiB")
    print(f"joint / costliest single: {medians[TASKS] / costliest:.2f}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    record = {"+".join(tasks): {"seconds": seconds[tasks], "peak_gib": memory[tasks]} for tasks in sets}
    OUT.write_text(json.dumps({"videos": options.videos, "device": device.type, **record}, indent=1))


if __name__ == "__main__":
    main()
