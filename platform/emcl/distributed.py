"""Ranks and their communication. The only module that uses torch.distributed.

Models and losses take a `Ranks` as an argument; `ALONE` is one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emcl.errors import UserError, first_line

MEETING = timedelta(minutes=10)
"""How long the first rank that has started waits for the last."""
LONGEST_WAIT = timedelta(days=1)
"""How long a rank may wait for another in a collective. It is not what ends a run whose ranks wait in vain: the
watchdog (train/watchdog.py), which knows what the others do, ends it long before. The backends' own 10 and 30 minutes
would abort validation, saving and features of frozen towers that are merely slow."""

_exchanging: Callable[[], AbstractContextManager[None]] = nullcontext

# names that PyTorch has had since 2.13; the older ones warn there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of ranks."""

    rank: int = 0
    world_size: int = 1
    objects: Any = field(default=None, compare=False)
    """The process group for Python objects; by default that for tensors. With NCCL it is a gloo group: NCCL would copy
    every object to each GPU, such as the whole score matrix of an evaluation."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, outside autograd; the same bits on every rank."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        with _exchanging():
            dist.all_reduce(total)
        return total

    def maximum(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over ranks, outside autograd."""
        if self.world_size == 1:
            return tensor.detach()
        highest = tensor.detach().clone()
        with _exchanging():
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
        dist.all_gather_object(gathered, item, group=self.objects)
        return gathered

    def collect_objects(self, item: Any) -> list[Any] | None:
        """Every rank's picklable object, in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [item]
        gathered: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(item, gathered, dst=0, group=self.objects)
        return gathered

    def from_first(self, item: Any) -> Any:
        """Rank 0's picklable object on every rank."""
        if self.world_size == 1:
            return item
        shared = [item]
        dist.broadcast_object_list(shared, src=0, group=self.objects)
        return shared[0]

    def agree(self, error: Exception | None) -> None:
        """Raises the first rank's error on all ranks, so that none goes on to wait for one that has ended."""
        first = next((failure for failure in self.gather_objects(error) if failure is not None), None)
        if first is not None:
            raise first

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def open_store(self, timeout: timedelta) -> dist.Store:
        """A separate connection to the rendezvous store. It answers even while a collective hangs.

        The store's host is rank 0's process (torchrun's agent if that started the ranks).

        Raises:
            RuntimeError: it does not answer within `timeout`.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore("watch", store)

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
        with _exchanging():
            _all_gather(out, tensor)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # in bf16 the sum of 512 ranks' shares was 2.7% off
        gradient = gradients[0].float().contiguous()
        share = gradient.new_empty((len(gradient) // ctx.ranks.world_size, *gradient.shape[1:]))
        with _exchanging():
            _reduce_scatter(share, gradient)
        return share.to(gradients[0].dtype), None


class _SumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor]:
        return (_summed(gradients[0]),)


def _summed(tensor: Tensor) -> Tensor:
    """Over ranks, in fp32 at least; in the tensor's own precision again."""
    total = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    with _exchanging():
        dist.all_reduce(total)
    return total.to(tensor.dtype)


def described() -> Ranks:
    """This process's rank by the launcher's environment variables, before the rendezvous."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def device() -> torch.device:
    """This process's accelerator, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def quiet_start() -> None:
    """Silences messages of DeepSpeed at import and start that no user can act on."""
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that PyTorch 2.14 has renamed
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)


def compile_nothing() -> None:
    """Keeps DeepSpeed, on CPUs, from compiling a reduction for tensor-parallel inference, which nothing here calls.

    It needs a compiler, half a minute, and 66 MiB of shared memory that is not freed, and a build that is killed leaves
    a lock that all later runs wait for without any message.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start() -> Ranks:
    """Joins the launcher's process group; without a launcher, a group of one process.

    Raises:
        UserError: the launcher's port is taken, or some ranks do not come within `MEETING`.
    """
    if dist.is_initialized():  # a second run in one process: DeepSpeed does not survive a new group
        return _joined()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":  # no other process needs it, so that several runs can share a machine
        os.environ["MASTER_PORT"] = str(_free_port())
    import deepspeed

    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
        # NCCL's own thread would abort the process, before the watchdog names the rank
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    compile_nothing()
    backend = "nccl" if on_gpu else "gloo"
    store, rank, world_size = _meet()
    if world_size > 1 and (interface := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # without it, NCCL's barrier takes the GPU of the rank's number, which need not be this process's
    own = device() if on_gpu else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=LONGEST_WAIT, device_id=own)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=LONGEST_WAIT)
    if on_gpu and world_size > 1:
        global _objects
        _objects = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _joined()


_objects: Any = None
"""The group for Python objects, if it is not that for tensors."""


def _joined() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), _objects)


def _interface() -> str | None:
    """The network interface by which this process reaches the rendezvous host.

    By default gloo resolves the host's name, which on many clusters gives an address that other nodes cannot reach.
    """
    import socket

    import psutil

    try:
        family, kind, _, _, remote = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # nothing is sent
            probe.connect(remote)
            address = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(one.address == address for one in addresses)), None)


def _meet() -> tuple[dist.Store, int, int]:
    """The rendezvous store, this rank, and the number of ranks.

    Raises:
        UserError: as `start`.
    """
    try:
        return next(dist.rendezvous("env://", timeout=MEETING))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        way_out = "deepspeed --master_port N platform/launch.py ... (or --module emcl.launch ...)"
        raise UserError(f"port {port} is taken, by another run perhaps: give a free one, {way_out}") from None
    except dist.DistStoreError as error:
        raise UserError(
            f"not all {os.environ['WORLD_SIZE']} ranks came within {MEETING.seconds // 60} minutes to "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: look at the other nodes' output "
            f"({first_line(error)[:200]})"
        ) from None


def observe_exchanges(during: Callable[[], AbstractContextManager[None]]) -> None:
    """Enters `during()` around every collective on tensors that this process waits for, DeepSpeed's too."""
    global _exchanging
    _exchanging = during
    from deepspeed.comm import comm

    for name in _DEEPSPEED_COLLECTIVES:
        if hasattr(type(comm.cdb), name):
            setattr(comm.cdb, name, _observed(getattr(type(comm.cdb), name).__get__(comm.cdb)))


_DEEPSPEED_COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather",
    "all_gather_coalesced", "reduce_scatter_coalesced", "all_reduce_coalesced", "barrier",
)  # fmt: skip


def _observed(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with _exchanging():
            return collective(*arguments, **options)

    return call


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def pretended(world_size: int) -> Iterator[Ranks]:
    """Rank 0 of so many simulated ranks: collectives have the right shapes and exchange nothing."""
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
