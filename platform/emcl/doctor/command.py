"""`emcl doctor`: every check in a stated time, a table on the screen, and a JSON file for a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emcl.doctor.checks import Check, Checks, run_groups, table, write_json
from emcl.doctor.exactness import exactness
from emcl.doctor.loader_speed import feeding
from emcl.doctor.setting_costs import augmentation, comparing, deterministic
from emcl.doctor.speed import emcl_share, speed
from emcl.doctor.trainers import Bench, open_bench
from emcl.doctor.training import host_waits, precisions, resuming, zero_stages
from emcl.errors import UserError
from emcl.train.arithmetic import WORKSPACE

GROUPS: dict[str, Callable[[Bench], Any]] = {
    "GPU beside CPU": exactness,
    "host waits": host_waits,
    "precisions": precisions,
    "ZeRO": zero_stages,
    "resuming": resuming,
    "loading": feeding,
    "augmentation": augmentation,
    "comparing": comparing,
    "EMCL": emcl_share,
    "deterministic": deterministic,
    "speed": speed,
}
"""In this order, since a slow machine leaves out the last ones."""
PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "open_clip_torch", "timm", "av", "numpy")


def doctor(out: Path, shards: Path | None, only: Sequence[str], minutes: float) -> bool:
    """Runs the groups (or those of `only`), prints the table and writes it; returns whether nothing failed.

    Raises:
        UserError: no such group or shards, or nowhere to write.
    """
    for name in only:
        if name not in GROUPS:
            raise UserError(f"--only {name}: none of {', '.join(GROUPS)}")
    # PyTorch reads it once, at the first product on a GPU, long before the checks that need it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    facts = machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    try:  # now, not after the minutes that the checks take
        write_json(out, facts, {})
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    folder = Path(tempfile.mkdtemp(prefix="emcl-doctor-"))
    try:
        bench = open_bench(folder, shards)
        chosen: dict[str, Checks] = {
            name: partial(checks, bench) for name, checks in GROUPS.items() if not only or name in only
        }
        outcomes: dict[str, list[Check]] = run_groups(
            chosen, 60 * minutes, partial(print, flush=True), partial(write_json, out, facts)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(outcomes)}\n")
    write_json(out, facts, outcomes)
    failed = [check for checks in outcomes.values() for check in checks if check.passed is False]
    print(f"{len(failed)} checks failed; {out} holds all of it: send it with a bug report")
    return not failed


def machine() -> dict[str, str]:
    """Versions and hardware that the results depend on."""
    from emcl.version import __version__

    facts = {"emcl": __version__, "python": sys.version.split()[0], "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} of them",
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    else:
        facts["gpu"] = "none: what needs one is left out"
    return facts
