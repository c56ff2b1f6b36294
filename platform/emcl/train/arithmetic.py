"""How exact a run's arithmetic is: TF32, and the same bits in every run, as the configuration says."""

from __future__ import annotations

import os

import torch

from emcl.config import Config

WORKSPACE = ":4096:8"
"""With workspaces of this size cuBLAS takes the same way each time (its documentation: results reproducibility)."""


def set_arithmetic(config: Config) -> None:
    """Sets PyTorch's switches for this process, before it first uses a GPU."""
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(config.deterministic)
    # it would show reads of what nobody wrote, at a price
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # the fastest algorithm may be another one tomorrow
    # of attention's three kernels this one's backward pass adds up in the order in which blocks happen to finish
    torch.backends.cuda.enable_mem_efficient_sdp(not config.deterministic)
