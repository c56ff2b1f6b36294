"""Human captioning scores on MSR-VTT: each test video's first sentence against the other 19. `make human MSRVTT=DIR`.

A ceiling to compare models with, although a model is scored against all 20 sentences.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from emcl.metrics.caption_metrics import caption_metrics
from emcl.prepare.benchmarks import read_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="folder of MSR-VTT's official annotations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/human_captions.json"))
    options = parser.parse_args()
    clips, _ = read_benchmark("msrvtt", "official", options.annotations)
    test = [clip for clip in clips if clip.split == "test"]
    began = time.perf_counter()
    scores = caption_metrics(
        {clip.id: clip.captions[0] for clip in test}, {clip.id: clip.captions[1:] for clip in test}
    )
    taken = time.perf_counter() - began
    metrics = {name: round(100 * value, 2) for name, value in scores.metrics.items()}
    sentences = sum(len(clip.captions) for clip in test)
    print(f"{len(test):,} videos, {sentences:,} sentences, {scores.tokenizer} tokenizer, {taken:.0f} s")
    print(" ".join(f"{name} {value:.1f}" for name, value in metrics.items()))
    if scores.missing:
        print(f"without {scores.missing}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"videos": len(test), "sentences": sentences, "seconds": taken, "tokenizer": scores.tokenizer}
    options.out.write_text(json.dumps({**record, "metrics": metrics}, indent=1))


if __name__ == "__main__":
    main()
