"""Starts ranks on this machine without the `deepspeed` launcher, whose start takes as long as theirs."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment variables that the launcher would set, by rank."""
    group = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    every = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in every]


def start_ranks(
    command: Sequence[str], ranks: int, *, env: Mapping[str, str] = os.environ, **how: Any
) -> list[subprocess.Popen[bytes]]:
    """Starts one process per rank; `how` is passed to `Popen`."""
    return [
        subprocess.Popen([*command, f"--local_rank={rank}"], env={**env, **own}, **how)
        for rank, own in enumerate(environments(ranks))
    ]
