"""Every shipped architecture trains in bf16: what DeepSpeed casts and what it leaves meets without an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import small
from emcl import distributed
from emcl.config import Config, resolve
from emcl.data.batch import Batch
from emcl.model.batch_norm import keep_statistics_in_full_precision
from emcl.model.model_settings import ModelConfig
from emcl.model.open_clip_backbone import OpenClipBackbone
from emcl.prepare.pretrained_towers import write_towers
from emcl.run_folder import RunFolder
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer

ARCHITECTURES = {
    "tiny": (64, []),
    "ViT-B-32": (224, []),
    "lite0_minilm": (64, ["model.image_weights=null", "model.frozen=[]", "model.cache_features=false"]),
}


def stepped(config: Config, folder: Path) -> tuple[Trainer, list[Batch], dict[str, torch.Tensor]]:
    """A trainer that has taken its first step, with the step's micro-batches and losses."""
    ranks = distributed.start()
    trainer = Trainer(*open_splits(config), ranks, torch.device("cpu"), RunFolder(folder / "run"))
    trainer.engine.train()
    batches, _ = next(trainer._steps(0))
    return trainer, batches, trainer._step(batches)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_of_every_shipped_architecture_in_bf16(
    name: str, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_towers(tmp_path / "weights" / "towers")
    size, settings = ARCHITECTURES[name]
    tasks = ["retrieval", "captioning", "msrvtt_qa"]
    config = resolve(tasks, "sample", [
        *small(sample_shards), f"model.name={name}", f"data.image_size={size}", "precision=bf16", "data.frames=2",
        "data.batch_size=2", "emcl.bases=8", "data.workers=0", *settings,
    ])  # fmt: skip
    trainer, _, losses = stepped(config, tmp_path)
    assert len(losses) >= 3 and all(loss.isfinite() for loss in losses.values())
    assert trainer.engine.skipped_steps == 0
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}


def test_a_step_of_all_tasks_with_clip_in_fp16_recomputed_and_in_micro_batches(
    sample_shards: Path, tmp_path: Path
) -> None:
    config = resolve(["retrieval", "captioning", "msrvtt_qa"], "sample", [
        *small(sample_shards), "precision=clip_fp16", "deepspeed=deepspeed/zero0.json", "optim.accumulation=2",
        "model.activation_checkpointing=true", "optim.gather_with_grad=false", "data.workers=0",
        "tasks.msrvtt_qa.head=reference", "optim.optimizer=bert_adam", "emcl.bases=8",
    ])  # fmt: skip
    trainer, batches, losses = stepped(config, tmp_path)
    assert len(batches) == 2 and len(losses) >= 4 and all(loss.isfinite() for loss in losses.values())
    assert trainer.engine.skipped_steps == 0
    kinds = {weight.dtype for name, weight in trainer.model.named_parameters() if ".trunk." not in name}
    assert kinds == {torch.float32}


def test_statistics_of_batch_norms_move_in_full_precision() -> None:
    half, full = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    keep_statistics_in_full_precision(half)
    for parameter in half.parameters():  # as DeepSpeed does
        parameter.data = parameter.data.bfloat16()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pixels = (torch.randn(4, 3, 8, 8, generator=generator) + 2).bfloat16()
        out = half(pixels)
        wanted = full(pixels.float())
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(half.running_mean, full.running_mean, atol=1e-4, rtol=1e-3)
    out.sum().backward()
    assert half.weight.grad is not None and half.weight.grad.dtype == torch.bfloat16
    assert half.weight is dict(half.named_parameters())["weight"]


def test_a_tower_with_batch_norms_keeps_the_names_of_its_weights() -> None:
    backbone = OpenClipBackbone(ModelConfig(name="RN50", temporal="mean"), max_tokens=16, load_weights=False)
    assert "image.trunk.bn1.running_mean" in backbone.state_dict()
