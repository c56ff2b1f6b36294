"""Ranks and what they exchange. The only module that touches torch.distributed.

Models and losses take a `Ranks` as an argument; `ALONE` is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emcl.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, outside autograd; the same bits on every rank."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def maximum(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over ranks, outside autograd."""
        if self.world_size == 1:
            return tensor.detach()
        highest = tensor.detach().clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return highest

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """(b, ...) of each rank -> (world b, ...), differentiable: gradients of all ranks' uses flow back."""
        return tensor if self.world_size == 1 else _GatherRows.apply(tensor, self)

    def sum_with_grad(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, differentiable: each rank's term gets the gradients of all ranks' uses of the sum."""
        return tensor if self.world_size == 1 else _SumWithGrad.apply(tensor)

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's picklable object, in rank order."""
        if self.world_size == 1:
            return [item]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item)
        return gathered

    def agree(self, error: Exception | None) -> None:
        """Raises the first rank's error on all ranks, so that none goes on to wait for one that has ended."""
        first = next((found for found in self.gather_objects(error) if found is not None), None)
        if first is not None:
            raise first

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors by rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def open_store(self, timeout: timedelta) -> dist.Store | None:
        """A store of its own for small facts, held by rank 0; called by all ranks. Works while a collective hangs.

        None for a rank that does not reach it.
        """
        host = os.environ["MASTER_ADDR"]
        held = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False) if self.first else None
        port = self.gather_objects(held.port if held else None)[0]
        try:
            return held or dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)
        except RuntimeError:  # torch's kinds of network errors
            return None

    def share(self, total: int) -> slice:
        """This rank's rows of `total` gathered ones."""
        size = total // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)


ALONE = Ranks()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        tensor = tensor.contiguous()
        out = tensor.new_empty((ranks.world_size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        mine = gradient.new_empty((len(gradient) // ctx.ranks.world_size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(mine, gradient)
        return mine, None


class _SumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor]:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return (total,)


def described() -> Ranks:
    """This process among those that the launcher says there will be, before they have met."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def device() -> torch.device:
    """This process's accelerator, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def quiet_start() -> None:
    """Silences what DeepSpeed prints on import and start that no user can act on."""
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def start() -> Ranks:
    """Joins the process group that the launcher describes; one process where there is none.

    Raises:
        UserError: the launcher's port is taken.
    """
    if dist.is_initialized():  # a second run in one process: DeepSpeed does not survive a new group
        return Ranks(dist.get_rank(), dist.get_world_size())
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":  # nobody else needs to know it, so that several runs share a machine
        os.environ["MASTER_PORT"] = str(_free_port())
    import deepspeed

    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    # On CPUs DeepSpeed compiles a reduction for tensor-parallel inference, which nothing here calls: that takes a
    # compiler, half a minute, and 66 MiB of shared memory that stay, and a build that is killed leaves a lock that all
    # later runs wait for without a word.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        way_out = "deepspeed --master_port N platform/launch.py ..."
        raise UserError(f"port {port} is taken, by another run perhaps: give a free one, {way_out}") from None
    return Ranks(dist.get_rank(), dist.get_world_size())


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def pretended(world_size: int) -> Iterator[Ranks]:
    """The first of so many ranks that are not there: collectives have the right shapes and exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if world_size == 1:
        yield ALONE
        return
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield Ranks(0, world_size)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
