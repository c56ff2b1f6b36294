"""One rank's training step on fake CUDA tensors: its memory by owner, its collectives, its operators.

The platform's own collators, model, losses and backward pass run as `Trainer` runs them, among any number of simulated
ranks (torch's fake process group). Tensors have no data, so a step of any size takes some seconds and no memory. Code
that mixes devices, or needs a tensor's value on the host, raises.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emcl import distributed
from emcl.components import BACKBONES
from emcl.config import Config
from emcl.data.batch import Batch, each_tensor
from emcl.data.captions import Caption, TextSource, Tokens
from emcl.data.loader import Collate, Loaded
from emcl.data.sampler import Draw
from emcl.data.samples import QAPair, Sample
from emcl.errors import UserError, first_line
from emcl.model.backbone import tokenizer_of
from emcl.multitask import VideoLanguageModel, collators, total_loss
from emcl.train.fake_cuda import GPU, NoFakeCudaError, pretended_context

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
INPUTS, BACKWARD = "inputs", "backward in flight"
_WORDS = ("the", "man", "in", "a", "red", "shirt", "is", "playing", "with", "small", "dog", "on", "grass", "people")
_ALIGNMENT = 512
"""Bytes: torch's CUDA allocator rounds up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class FakeStep:
    """The cost of a step on one rank."""

    peak: int
    """Peak bytes: parameters, buffers, gradients and all other tensors of the step."""
    held: dict[str, int]
    """The peak by owner: parameters, buffers, gradients; other tensors by where they are made (inputs, tower, head)."""
    peak_without_gradients: int
    """Peak bytes if each finished gradient is freed (ZeRO-2 and 3)."""
    held_without_gradients: dict[str, int]
    gradients: int
    """Bytes of all gradients, at the end."""
    messages: dict[str, tuple[int, int]]
    """Name and data type of a collective -> calls, and bytes of its largest tensors."""
    forward_operators: int
    """Without views, which launch nothing."""
    operators: int
    odd: list[str]
    """Problems: tensors outside parameters and buffers, parameters without gradient, messages that NCCL refuses."""


def fake_steps(config: Config, sizes: Sequence[tuple[int, int]], samples: Sequence[Sample] = ()) -> list[FakeStep]:
    """A step for each (ranks, videos of one rank); call it through `in_clean_process`.

    Args:
        config: with the tasks' vocabularies.
        samples: their captions and questions make the batch, repeated as needed; made up if empty.

    Raises:
        NoFakeCudaError: this torch does not support it.
    """
    with pretended_context():
        try:
            return [fake_step(config, ranks, videos, samples) for ranks, videos in sizes]
        except RuntimeError as error:
            if "CUDA error" not in str(error) and config.model.backbone in BACKBONES.built_in:
                raise
            raise NoFakeCudaError(f"a layer does not run on tensors without numbers ({first_line(error)})") from None


def fake_step(config: Config, world_size: int, videos: int, samples: Sequence[Sample] = ()) -> FakeStep:
    """Forward, losses and backward of one rank; within `pretended_context`."""
    with distributed.pretended(world_size) as ranks:
        model = build_on_meta(config).train()
        batch = batch_of(config, videos, samples)
        model.ranks = ranks
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        if config.precision == "clip_fp16":
            model.backbone.keep_matrices_in_half()
        move_to_fake_gpu(model, DTYPES.get(config.precision), mode)
        odd = [f"{name}: a tensor outside parameters and buffers" for name in stray_tensors(model)]
        watch = _Watch()
        with mode, parts_of(model, watch):
            host = with_whole_frames(each_tensor(batch, mode.from_tensor), config, model)
            watch.begin(model)
            with watch:
                loss = total_loss(model(batch=host.to(GPU)))
                forward = sum(watch.operators.values())
                watch.owner = BACKWARD
                loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            odd.append(f"{name} got no gradient")
    return FakeStep(
        peak=watch.peak,
        held=watch.held_at_peak,
        peak_without_gradients=watch.lean_peak,
        held_without_gradients=watch.held_at_lean_peak,
        gradients=watch.held[GRADIENTS],
        messages={name: (calls, watch.message_bytes[name]) for name, calls in watch.messages.items()},
        forward_operators=forward,
        operators=sum(watch.operators.values()),
        odd=odd + watch.odd,
    )


def build_on_meta(config: Config) -> VideoLanguageModel:
    with torch.device("meta"):
        return VideoLanguageModel(config, load_weights=False)


def move_to_fake_gpu(model: nn.Module, dtype: torch.dtype | None, mode: FakeTensorMode) -> None:
    """As DeepSpeed would hold the model: parameters in `dtype` (None: each in its own), buffers as they are."""
    made: dict[int, Tensor] = {}  # tied parameters stay tied
    with mode:
        for module in model.modules():
            for key, old in module._parameters.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=dtype or old.dtype, device=GPU)
                        made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
                    module._parameters[key] = made[id(old)]  # type: ignore[assignment]
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in made:
                        made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
                    module._buffers[key] = made[id(buffer)]


def stray_tensors(model: nn.Module) -> list[str]:
    """Tensors that modules hold outside parameters and buffers: `.to(device)` would leave them behind."""
    names = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                names += [f"{name}.{key}" for item in tree_leaves(value) if isinstance(item, Tensor)]
    return names


def batch_of(config: Config, videos: int, samples: Sequence[Sample] = ()) -> Batch:
    """A batch from the tasks' collators: videos of full length, each sample's longest caption, frames of one pixel."""
    try:
        texts: TextSource = Tokens(tokenizer_of(config))
    except UserError:  # its files are missing: a run downloads them, or says so
        texts = Tokens(lambda texts: torch.zeros(len(texts), config.data.max_tokens, dtype=torch.long))
    if config.model.cache_features:
        with torch.device("meta"):
            texts = _Remembered(VideoLanguageModel(config, load_weights=False).backbone.text.width)
    shown = samples or made_up_samples(min(videos, 64), config.data.max_tokens)
    clip: Any = np.zeros((config.data.frames, 1, 1, 3), np.uint8)
    if config.model.cache_features:
        clip = np.zeros((config.data.frames, 1), np.float32)
    items: list[Loaded] = []
    for number in range(videos):
        sample = shown[number % len(shown)]
        longest = max(range(len(sample.captions)), key=lambda index: len(sample.captions[index]), default=None)
        items.append(Loaded(Draw(number, longest, number), sample, clip))
    return Collate(collators(config, texts, training=True), frames=config.data.frames)(items)


def made_up_samples(count: int, words: int) -> list[Sample]:
    """Samples with questions, and captions of so many words."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        captions = [" ".join(draw.choices(_WORDS, k=words)) for _ in range(4)]
        asked: list[QAPair] = [
            {"question": " ".join(draw.choices(_WORDS, k=8)), "answer": str(number % 7)} for _ in range(4)
        ]
        made.append(Sample(id=str(number), captions=captions, qa=asked))
    return made


class _Remembered:
    """A frozen text tower's outputs (n, W)."""

    def __init__(self, width: int) -> None:
        self.width = width

    def text(self, captions: Sequence[Caption]) -> Tensor:
        return torch.zeros(len(captions), self.width)

    def filler(self) -> Tensor:
        return self.text([Caption(0, 0, "")])


def with_whole_frames(batch: Batch, config: Config, model: VideoLanguageModel) -> Batch:
    """Replaces the one-pixel frames by full ones; under FakeTensorMode they take no memory."""
    assert batch.videos is not None
    side, count, kind = config.data.image_size, len(batch.videos.frames), batch.videos.frames.dtype
    shape = (count, model.backbone.image.width) if config.model.cache_features else (count, side, side, 3)
    return replace(batch, videos=replace(batch.videos, frames=torch.empty(shape, dtype=kind)))


class _Watch(TorchDispatchMode):
    """Counts operators and collectives, and the bytes of live storages by the part of the model that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.message_bytes: Counter[str] = Counter()
        self.odd: list[str] = []
        self.owner = INPUTS
        self.held: Counter[str] = Counter()
        self.now = self.peak = self.lean_peak = 0
        self.held_at_peak: dict[str, int] = {}
        self.held_at_lean_peak: dict[str, int] = {}
        self._alive: dict[int, tuple[int, str]] = {}

    def begin(self, model: nn.Module) -> None:
        """Counts the model's tensors, and registers hooks that count its gradients when they are finished."""
        for kind, tensors in ((PARAMETERS, model.parameters()), (BUFFERS, model.buffers())):
            self.owner = kind
            for tensor in tensors:
                self._count(tensor)
        self.owner = INPUTS
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._finished)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._message(func.overloadpacket.__name__.strip("_"), tree_leaves((args, kwargs)))
        elif not func.is_view and func.overloadpacket is not torch.ops.aten._unsafe_view:
            self.operators[func.overloadpacket.__name__] += 1
        for item in tree_leaves(out):
            if isinstance(item, Tensor):
                self._count(item)
        return out

    def _message(self, name: str, items: Sequence[Any]) -> None:
        tensors = [item for item in items if isinstance(item, Tensor)]
        self.odd += [f"{name} of a tensor on {t.device}: NCCL takes none" for t in tensors if t.device != GPU]
        self.odd += [f"{name} of a {tuple(t.shape)} in pieces" for t in tensors if not t.is_contiguous()]
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        label = f"{name} {str(largest.dtype).removeprefix('torch.')}"
        self.messages[label] += 1
        self.message_bytes[label] += largest.nbytes

    def _count(self, tensor: Tensor) -> None:
        if tensor.device != GPU:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self._alive[key] = size, self.owner
        self.held[self.owner] += size
        self.now += size
        weakref.finalize(storage, self._gone, key)
        if self.now > self.peak:
            self.peak, self.held_at_peak = self.now, dict(self.held)
        if self.now - self.held[GRADIENTS] > self.lean_peak:
            self.lean_peak, self.held_at_lean_peak = self.now - self.held[GRADIENTS], dict(self.held)

    def _gone(self, key: int) -> None:
        size, owner = self._alive.pop(key)
        self.held[owner] -= size
        self.now -= size

    def _finished(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._count(parameter.grad)
        key = parameter.grad.untyped_storage()._cdata
        size, owner = self._alive[key]
        self._alive[key] = size, GRADIENTS
        self.held[owner] -= size
        self.held[GRADIENTS] += size


@contextmanager
def parts_of(model: VideoLanguageModel, watch: _Watch) -> Iterator[None]:
    """Tells `watch` which part of the model is running, in recomputations too."""
    stack: list[str] = []
    handles = []

    def enter(owner: str) -> None:
        stack.append(watch.owner)
        watch.owner = owner

    def leave() -> None:
        watch.owner = stack.pop()

    def hook(module: nn.Module, owner: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda *_: enter(owner)))
        handles.append(module.register_forward_hook(lambda *_: leave(), always_call=True))

    for name, module in model.named_modules():
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        if first == "backbone" and second:
            hook(module, {"image": "image tower", "text": "text tower", "temporal": "temporal"}.get(second, second))
        elif first == "tasks" and second:
            hook(module, second)
    for name, head in model.heads.items():
        _name_losses(head, name, enter, leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_losses(head: Any, name: str, enter: Any, leave: Any) -> None:
    """Attributes all of a head's `losses` to it, including work outside its modules."""
    losses = head.losses

    def named(*arguments: Any) -> Any:
        enter(name)
        try:
            return losses(*arguments)
        finally:
            leave()

    head.losses = named
