"""Numerical settings of a run: TF32, and bitwise reproducible results (`deterministic`)."""

from __future__ import annotations

import os

import torch

from emcl.config import Config

WORKSPACE = ":4096:8"
"""With workspaces of this size cuBLAS is deterministic (its documentation: results reproducibility)."""


def set_arithmetic(config: Config) -> None:
    """Sets PyTorch's switches for this process, before it first uses a GPU."""
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(config.deterministic)
    # it would reveal reads of uninitialised memory, at the cost of time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # the fastest algorithm may differ between runs
    # this attention kernel's backward pass is not deterministic: it sums in the order in which blocks finish
    torch.backends.cuda.enable_mem_efficient_sdp(not config.deterministic)
