"""`emcl bundle`: what a machine without internet needs, as one tar.

The small one runs `emcl doctor` on a machine that has PyTorch, torchvision and transformers: this project's wheel,
those of what else the check imports, some sample shards, and check.sh with instructions. The full one (`--full`) has
every wheel for `pip install --no-index`, some gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Set
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from emcl.doctor.trainers import CLIPS
from emcl.errors import UserError
from emcl.prepare.sample_set import generate
from emcl.registry import DISTRIBUTION

FOLDER = "emcl-bundle"
"""The folder in the tar."""
CHECKED = ("deepspeed", "webdataset", "braceexpand", "open_clip_torch", "timm", "av", "omegaconf", "fsspec")
"""Packages that the check imports besides PyTorch; their requirements are added."""
AT_HAND = ("torch", "torchvision", "transformers")
"""Packages that the target of a small bundle has, with their direct requirements in versions that fit."""
SMALL_LIMIT = 60 * 10**6
OLDEST_GLIBC, NEWEST_GLIBC = 17, 39
CHECK = """#!/bin/sh
# Checks this machine: sh check.sh [options of emcl doctor]. PYTHON names another python3 that has PyTorch, torchvision
# and transformers. Nothing is fetched, and nothing is installed but into the folder `site` beside this file.
set -e
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
[ -d "$here/site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$here/site" \\
  "$here"/wheels/*.whl
PYTHONPATH="$here/site" exec "$python" -m emcl.cli doctor --shards "$here/shards" "$@"
"""
INSTALL = """#!/bin/sh
# Installs the platform without internet into the environment of PYTHON (default: python3): sh install.sh
set -e
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python3}" -m pip install --no-index --find-links "$here/wheels" emcl-platform
"""


def bundle(out: Path, source: Path, *, full: bool, python: str, machine: str) -> int:
    """Writes the tar; returns its size in bytes.

    Args:
        source: the checkout.
        python: version on the target, such as `3.12`.
        machine: architecture of the target, such as `x86_64`.

    Raises:
        UserError: no checkout, a wheel that is not available, or a small bundle that is too large.
    """
    if not (source / "setup.cfg").is_file():
        raise UserError(f"emcl bundle wants the checkout, whose wheel it builds: {source} has no setup.cfg")
    names = closure([DISTRIBUTION], python) if full else closure(CHECKED, python, without=required(AT_HAND, python))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / FOLDER
        wheels = root / "wheels"
        wheels.mkdir(parents=True)
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(source))
        for name in tqdm(sorted(names - {canonicalize_name(DISTRIBUTION)}), desc="wheels", unit="wheel"):
            _fetch(f"{name}=={distribution(name).version}", wheels, python, machine)
        if full:
            (root / "install.sh").write_text(INSTALL)
        else:
            (root / "check.sh").write_text(CHECK)
            generate(root / "shards", counts=CLIPS, seed=0, shard_size=64)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out, "w") as tar:
            tar.add(root, arcname=root.name)
    size = out.stat().st_size
    if not full and size > SMALL_LIMIT:
        raise UserError(f"{out} has {size / 1e6:.0f} MB, more than the {SMALL_LIMIT / 1e6:.0f} of a small bundle")
    return size


def closure(roots: Iterable[str], python: str, without: Set[str] = frozenset()) -> set[str]:
    """These packages and all that they need on Linux, as installed here; canonical names.

    Packages of `without`, and what these alone need, are left out.
    """
    reached: set[str] = set()
    waiting = {Requirement(root) for root in roots}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) not in seen and name not in without:
            seen.add((name, extras))
            reached.add(name)
            waiting |= _requirements(name, extras, python)
    return reached


def required(packages: Iterable[str], python: str) -> set[str]:
    """These packages and their direct requirements; canonical names."""
    direct = {one.name for name in packages for one in _requirements(name, frozenset(), python)}
    return {canonicalize_name(name) for name in (*packages, *direct)}


def _requirements(name: str, extras: frozenset[str], python: str) -> set[Requirement]:
    """The requirements on Linux of a package that is installed here."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64",
    }  # fmt: skip
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        raise UserError(f"{name} is not installed here: make install") from None
    wanted = {Requirement(line) for line in lines}
    return {
        one
        for one in wanted
        if one.marker is None or any(one.marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras})
    }


def _fetch(package: str, wheels: Path, python: str, machine: str) -> None:
    """Downloads the wheel of the version installed here for the target; builds it if there is only a source."""
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
    platforms += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]
    target = [f"--platform={platform}" for platform in platforms]
    binary = ("--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *target)
    try:
        _pip("download", "--no-deps", *binary, "--dest", str(wheels), package)
    except UserError:
        before = set(wheels.iterdir())
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), package)
        if any(not made.name.endswith("-none-any.whl") for made in set(wheels.iterdir()) - before):
            raise UserError(f"{package} has no wheel for Python {python} on {machine}, and is no pure Python") from None


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise UserError(f"pip {arguments[0]} {arguments[-1]}: {said[0]}")
