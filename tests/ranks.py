"""Runs a function on several gloo processes and returns what each saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from emcl.distributed import ALONE, Ranks
from forked import start_server
from local_ranks import free_port


def run_on_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` on `world_size` processes; its results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    if world_size == 1:
        return [function(ALONE, *arguments)]
    start_server()
    how = {"nprocs": world_size, "start_method": "forkserver"}
    mp.start_processes(_worker, (world_size, free_port(), function, folder, arguments), **how)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(rank: int, world_size: int, port: int, function: Callable[..., Any], folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")
    torch.save(function(Ranks(rank, world_size), *arguments), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
