"""Evaluates many texts and videos: seconds, and peak memory beyond the features.

python benchmarks/large_evaluation.py --texts 10000 --videos 10000
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from emcl.tasks.retrieval import RetrievalTask

from emcl.config import resolve
from emcl.distributed import ALONE
from emcl.metrics.rescoring import DualSoftmax, QueryBank
from emcl.metrics.retrieval_metrics import protocol_metrics, retrieval_metrics
from emcl.model.emcl_layer import EMCLLayer

WIDTH = 512


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--layer", choices=("none", "compact"), default="none")
    parser.add_argument("--bank", type=int, default=1000, help="queries of the bank of QB-Norm")
    options = parser.parse_args()
    config = resolve(["retrieval"], "sample", ["emcl.enabled=false"])
    backbone: Any = SimpleNamespace(embed_dim=WIDTH, initial_logit_scale=1.0)
    task = RetrievalTask(config.tasks["retrieval"], config, backbone).eval()
    torch.manual_seed(0)
    text = torch.randn(options.texts, WIDTH)
    frames = torch.randn(options.videos, options.frames, WIDTH)
    mask = torch.ones(options.videos, options.frames, dtype=torch.bool)
    layer = None
    if options.layer == "compact":
        layer = EMCLLayer(variant="compact", bases=64, width=WIDTH).fit(frames[:1000, 0], text[:1000]).eval()
    before = peak_mib()
    seconds = {}

    def timed(name: str, call: Any) -> Any:
        began = time.perf_counter()
        result = call()
        seconds[name] = round(time.perf_counter() - began, 1)
        return result

    scores = timed("similarity", lambda: task.similarity_in_tiles(text, frames, mask, 32, ALONE, layer))
    owner = np.arange(options.texts) % options.videos
    timed("metrics", lambda: protocol_metrics(scores, owner))
    timed("DSL", lambda: retrieval_metrics(scores, owner, rescore=(DualSoftmax(), DualSoftmax())))
    rng = np.random.default_rng(0)
    banks = [rng.standard_normal((options.bank, n), dtype=np.float32) for n in (options.videos, options.texts)]
    by_text, by_video = (partial(QueryBank(), bank_BG=bank) for bank in banks)
    timed("QB-Norm", lambda: retrieval_metrics(scores, owner, rescore=(by_text, by_video)))
    print(json.dumps({"peak_mib_beyond_features": round(peak_mib() - before), "seconds": seconds}))


if __name__ == "__main__":
    main()
