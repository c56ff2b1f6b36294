"""Fake CUDA tensors with a backward pass, on any machine: what a step on a GPU would do, without a GPU.

torch's FakeTensorMode makes tensors that have a shape, a type and a device but no data. Their forward pass needs no
GPU; their backward pass asks torch's CUDA library for a context, which `pretended_context` fakes. A process that does
so cannot be used for anything else: `in_clean_process` runs a function in a separate process that sees no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)
Result = TypeVar("Result")
_HEADER = "include/ATen/detail/AcceleratorHooksInterface.h"
_SLOTS = 64
"""Entries of the virtual table that are copied: more than torch's hooks have before the one that is replaced."""


class NoFakeCudaError(Exception):
    """This torch runs no backward pass on fake CUDA tensors; the message says why."""


@contextlib.contextmanager
def pretended_context() -> Iterator[None]:
    """Lets autograd run on fake CUDA tensors in a process that sees no GPU.

    Autograd asks torch's CUDA hooks whether device 0 has a context, which raises without a driver. That virtual
    function is replaced, in a copy of the hooks' virtual table, by one that returns true. Its index is found by
    counting in the header that torch ships. The backward pass stays on the calling thread, as autograd has no thread
    for a missing device.

    Raises:
        NoFakeCudaError: torch has no CUDA part, sees a GPU, or is not built as this expects.
    """
    if torch.version.cuda is None:
        raise NoFakeCudaError("this torch is built without CUDA")
    if torch.cuda.is_available():
        raise NoFakeCudaError("this process sees a GPU")
    folder = Path(torch.__file__).parent
    try:
        lines = (line.strip() for line in (folder / _HEADER).read_text().splitlines())
        declared = [line for line in lines if line.startswith("virtual ")]
        # the destructor, which comes first, takes two entries
        slot = 1 + next(number for number, line in enumerate(declared) if "hasPrimaryContext" in line)
        find = ctypes.CDLL(str(folder / "lib" / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    except (OSError, StopIteration, AttributeError) as error:
        raise NoFakeCudaError(f"torch {torch.__version__} keeps its CUDA hooks elsewhere ({error!r})") from None
    if not 0 < slot < _SLOTS:
        raise NoFakeCudaError(f"torch {torch.__version__} has another table of CUDA hooks")
    find.restype = ctypes.c_void_p
    hooks = ctypes.cast(find(), ctypes.POINTER(ctypes.c_void_p))
    before, size = hooks[0], ctypes.sizeof(ctypes.c_void_p)
    assert before is not None
    # two words before the table belong to it: the offset to the object, and its type
    copy = (ctypes.c_void_p * (_SLOTS + 2)).from_buffer_copy(ctypes.string_at(before - 2 * size, (_SLOTS + 2) * size))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _, index: index == 0)
    copy[2 + slot] = ctypes.cast(answer, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(copy) + 2 * size
    try:
        with torch.autograd.set_multithreading_enabled(False), fused_attention():
            yield
    finally:
        hooks[0] = before


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Uses a GPU's fused attention kernels, which do not store the attention matrix, on fake or meta tensors.

    PyTorch asks the GPU which of them it supports, and without a GPU falls back to plain products: for ViT-L-14 with 16
    x 12 frames the plan was then 68 GiB, where an H100 took 43.
    """
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        half = query.dtype in (torch.bfloat16, torch.float16)
        fits = query.device.type in ("cuda", "meta") and query.ndim == 4 and query.shape[-1] % 8 == 0 and not enable_gqa
        if fits and half and attn_mask is None:
            out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
            return out
        if fits and torch.backends.cuda.mem_efficient_sdp_enabled():
            bias = _as_bias(attn_mask, query, key)
            out = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
            return out
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _as_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias added to the scores (B, heads, L, S); a boolean mask becomes minus infinity where it is False."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.expand(*query.shape[:3], key.shape[2])


def try_backward() -> None:
    """The smallest step that needs the trick.

    Raises:
        NoFakeCudaError: it does not work with this torch.
    """
    with pretended_context():
        try:
            with FakeTensorMode():
                weight = torch.nn.Parameter(torch.empty(2, 2, device=GPU))
                (weight @ weight).sum().backward()
            works = weight.grad is not None and weight.grad.device == GPU
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise NoFakeCudaError(f"torch {torch.__version__}: {str(error).splitlines()[0]}") from None
    if not works:
        raise NoFakeCudaError(f"torch {torch.__version__} gives fake tensors no gradient")


def why_not() -> str | None:
    """Why fake CUDA tensors have no backward pass with this torch; None where they have."""
    try:
        in_clean_process(try_backward)
    except NoFakeCudaError as error:
        return str(error)
    return None


def in_clean_process(call: Callable[..., Result], *arguments: Any) -> Result:
    """`call(*arguments)` in a new process without GPUs, so that it leaves no trace in this one.

    Raises:
        NoFakeCudaError: as `call` does, or the process dies.
    """
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded for it
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)  # the new process takes them over before it imports torch
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(call, *arguments).result()
    except BrokenProcessPool:
        raise NoFakeCudaError(f"torch {torch.__version__} ends the process that tries") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
