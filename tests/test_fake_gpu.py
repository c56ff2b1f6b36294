"""A step on fake CUDA tensors, and a real one on the CPU: what a GPU would refuse, wait for, send and hold.

Fake tensors raise where devices mix and where a value is wanted on the host. What they hide, such as decompositions
that look whether they have converged, the real step shows, DeepSpeed's part included.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ROOT, TINY, run_program, small
from emcl import distributed
from emcl.config import Config, resolve
from emcl.data.batch import each_tensor
from emcl.multitask import total_loss
from emcl.train.fake_cuda import GPU, NoFakeCudaError, in_clean_process, pretended_context
from emcl.train.fake_step import (
    DTYPES,
    FakeStep,
    batch_of,
    build_on_meta,
    fake_step,
    move_to_fake_gpu,
    with_whole_frames,
)
from emcl.train.plan import memory_parts, plan, planned_peak

TASKS = ("retrieval", "captioning", "msrvtt_qa")
TOGETHER = ",".join(TASKS)
LAYERS = {
    "reference": ["emcl.variant=reference"],
    "compact": ["emcl.variant=compact"],
    "off": ["emcl.enabled=false", "tasks.captioning.emcl=false"],
}
SMALL = [f"model.name={TINY}", "data.image_size=32", "data.frames=3", "data.max_tokens=16", "emcl.bases=8"]
VIDEOS = 2
CASES = [(TOGETHER, layer, precision, ranks) for layer in LAYERS for precision, ranks in (("fp32", 8), ("bf16", 512))]
"""Tasks together run the lines of each alone; alone, each goes once through every layer, type and number of ranks."""
CASES += [
    (task, layer, *how)
    for task, hows in zip(
        TASKS,
        (
            (("bf16", 8), ("fp32", 512), ("fp32", 1)),
            (("fp32", 1), ("bf16", 8), ("bf16", 512)),
            (("fp32", 512), ("bf16", 1), ("fp32", 8)),
        ),
        strict=True,
    )
    for layer, how in zip(LAYERS, hows, strict=True)
]
KNOWN_WAITS = {
    # DeepSpeed looks whether the gradient's norm is finite: once for the step, once for each group of weights
    ("deepspeed/runtime/utils.py:is_invalid_grad_norm", "deepspeed/runtime/zero/stage_1_and_2.py:step"),
    (
        "deepspeed/runtime/utils.py:is_invalid_grad_norm",
        "deepspeed/runtime/zero/stage_1_and_2.py:unscale_and_clip_grads",
    ),
    # in half precision it looks at the gradients besides
    ("deepspeed/runtime/zero/stage_1_and_2.py:has_overflow", "deepspeed/runtime/engine.py:_take_model_step"),
    # AdamW counts its steps on the host; on a GPU its fused form does not
    ("torch/optim/optimizer.py:_get_value", "torch/optim/adam.py:_single_tensor_adam"),
}
"""Functions that let a host wait, and who calls them."""
LARGE = [("", "bf16", 8), ("model.activation_checkpointing=true", "bf16", 64)]
"""Of ViT-B-32 as msrvtt_retrieval trains it: settings, precision, ranks."""


def case_config(tasks: str, layer: str, precision: str, ranks: int) -> Config:
    settings = [f"precision={precision}", f"data.batch_size={VIDEOS * ranks}", "data.generate=false", "data.train=none"]
    chosen = [item for item in LAYERS[layer] if "captioning" in tasks or not item.startswith("tasks.captioning")]
    return resolve(tasks.split(","), "sample", [*SMALL, *settings, *chosen])


def large_config(setting: str, precision: str) -> Config:
    return resolve(["retrieval"], "msrvtt_retrieval", [*filter(None, [setting]), f"precision={precision}"])


class _Bytes(TorchDispatchMode):
    """The most bytes of CUDA storages alive at once."""

    def __init__(self, already: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0
        self._see(list(already))

    def _see(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == GPU and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata)
        self.most = max(self.most, self.now)

    def _end(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see([item for item in tree_leaves(out) if isinstance(item, torch.Tensor)])
        return out


def peak_by_hand(config: Config, ranks: int, videos: int) -> int:
    """The step once more, as plainly as can be, counted by other means than the plan's."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with distributed.pretended(ranks) as pretended:
        model = build_on_meta(config).train()
        model.ranks = pretended
        move_to_fake_gpu(model, DTYPES[config.precision], mode)
        batch = batch_of(config, videos)
        with mode:
            batch = with_whole_frames(each_tensor(batch, mode.from_tensor), config, model)
            with _Bytes(iter([*model.parameters(), *model.buffers()])) as memory:
                total_loss(model(batch=batch.to(GPU))).backward()
    return memory.most


def run_case(config: Config, ranks: int) -> tuple[FakeStep, float, int, int]:
    """The step; the plan's peak for ZeRO 0, without the optimiser, which a step by hand has not; that peak; a width."""
    run_plan, config = plan(config)
    videos = config.data.batch_size // ranks
    step = fake_step(config, ranks, videos)
    sizes = memory_parts(run_plan, step, config, 0, ranks)
    planned = sum(size for name, size in sizes.items() if name != "optimiser")
    return step, planned, peak_by_hand(config, ranks, videos), build_on_meta(config).backbone.embed_dim


def run_all() -> dict[str, Any]:
    """Every case, in a process of its own."""
    with pretended_context():
        steps = {case: run_case(case_config(*case), case[3]) for case in CASES}
        return steps | {case: run_case(large_config(*case[:2]), case[2]) for case in LARGE}


@pytest.fixture(scope="module")
def steps() -> Any:
    try:
        return in_clean_process(run_all)
    except NoFakeCudaError as error:
        pytest.skip(f"no backward pass on fake CUDA tensors: {error}")


def stated_bytes(tasks: str, layer: str, precision: str, ranks: int, width: int, frames: int) -> int:
    """What the documents say that a rank's step exchanges, at most."""
    if ranks == 1:
        return 0
    number, everyone = (4 if precision == "fp32" else 2), ranks * VIDEOS
    total = 64 * len(tasks.split(","))  # numbers of tokens and answers

    def moments(dimension: int) -> int:
        return 4 * (dimension * (dimension + 1) // 2 + dimension + 1)

    modalities = 2 if layer == "compact" else 1
    columns = 3 * 4 * everyone  # highest, sum, and the sum's gradient
    if "retrieval" in tasks:
        total += everyone * frames * (width * (number + 4) + 1) + columns
        total += moments(width) * modalities * (layer != "off")
    if tasks != "captioning":
        total += 8 * everyone  # which video each is, once for both tasks that compare
    if "captioning" in tasks:
        total += moments(width) * (layer != "off")
    if "msrvtt_qa" in tasks:
        total += everyone * (2 * 4 * width * 4 + 1) + columns
        total += moments(4 * width) * modalities * (layer != "off")
    return total


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_is_right_for_a_gpu_sends_what_is_stated_and_holds_what_is_planned(steps: Any, case: Any) -> None:
    step, planned, by_hand, width = steps[case]
    unused = [item for item in step.odd if not (item.endswith("got no gradient") and without_use(item, case[0]))]
    assert unused == []
    sent = sum(size for _, size in step.messages.values())
    assert sent <= stated_bytes(*case, width, frames=3), step.messages
    assert planned == pytest.approx(by_hand, rel=0.05)


def without_use(item: str, tasks: str) -> bool:
    """The text tower's head and the like, which a task alone has no use for."""
    return tasks in ("captioning", "msrvtt_qa") and item.startswith("backbone.text")


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "-".join(map(str, case)))
def test_the_plan_of_a_large_model_is_its_peak(steps: Any, case: Any) -> None:
    step, planned, by_hand, _ = steps[case]
    assert step.odd == []
    assert planned == pytest.approx(by_hand, rel=0.05)


@pytest.mark.slow
@pytest.mark.xdist_group("fake GPU")
@pytest.mark.parametrize(
    ("model", "videos", "recomputed", "gib"),
    [("ViT-B-32", 64, "true", 4.57), ("ViT-L-14", 16, "false", 43.19)],
)
def test_the_plan_is_what_an_h100_took(model: str, videos: int, recomputed: str, gib: float) -> None:
    """`emcl doctor` there: PyTorch 2.11, retrieval in bf16 with 12 frames of 224 pixels, ZeRO 1."""
    settings = [
        f"model.name={model}", f"data.batch_size={videos}", f"model.activation_checkpointing={recomputed}",
        "data.image_size=224", "data.frames=12", "precision=bf16", "data.generate=false", "data.train=none",
    ]  # fmt: skip
    planned = planned_peak(resolve(["retrieval"], "sample", settings), gpus=1)
    if planned is None:
        pytest.skip("no backward pass on fake CUDA tensors with this torch")
    assert planned / 2**30 == pytest.approx(gib, rel=0.1)


def test_the_ranks_group_is_told_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's barrier would guess it from the rank's number, and rank 5 of nodes with four GPUs has another."""
    import deepspeed

    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    own = torch.device("cuda", 1)
    told = mock.Mock()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test's may be
    monkeypatch.setattr(distributed, "device", lambda: own)
    monkeypatch.setattr(distributed, "_meet", lambda: (None, 5, 8))
    monkeypatch.setattr(distributed, "_joined", lambda: distributed.ALONE)
    monkeypatch.setattr(distributed, "_objects", None)
    monkeypatch.setattr(torch.cuda, "set_device", told.set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", told.init_process_group)
    monkeypatch.setattr(torch.distributed, "new_group", told.new_group)
    monkeypatch.setattr(deepspeed, "init_distributed", told.init_distributed)
    with mock.patch.dict(os.environ, environment):
        distributed.start()
    assert told.init_process_group.call_args.args == ("nccl",)
    assert told.init_process_group.call_args.kwargs["device_id"] == own
    assert told.new_group.call_args.kwargs["backend"] == "gloo"


def test_a_torch_on_which_it_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(NoFakeCudaError, match="without CUDA"), pretended_context():
        pass


def test_the_host_waits_at_known_lines_alone(sample_shards: Path, tmp_path: Path) -> None:
    """Ours have none: a step's losses, for instance, are read every `tracking.every_steps` steps."""
    settings = [*small(sample_shards), "emcl.bases=8", "precision=bf16"]
    done = run_program(ROOT / "tests" / "host_waits.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    output = json.loads(done.stdout.splitlines()[-1])
    assert output["operators"] > 1000
    assert [wait for wait in output["waits"] if (wait["where"], wait["by"]) not in KNOWN_WAITS] == []
