"""The loss is a pure function of the global batch: N ranks give what one gives, EMCL on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emcl.config import resolve
from emcl.distributed import Ranks
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss
from emcl.multitask import VideoLanguageModel, total_loss
from ranks import run_on_ranks

BATCH = 8
TINY = str(Path(__file__).parent / "tiny_clip.json")
SETTINGS = [f"model.name={TINY}", "data.size=32", "data.frames=3", "data.words=12", f"data.batch_size={BATCH}"]


def global_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(BATCH, 3, dtype=torch.bool)
    mask[2, 1:] = False  # a short video
    return {
        "frames": torch.randint(0, 256, (BATCH, 3, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "mask": mask,
        "text": torch.randint(1, 400, (BATCH, 12), generator=generator),
    }


def part_of(batch: dict[str, torch.Tensor], rows: slice) -> dict:
    mask = batch["mask"][rows]
    return {
        "frames": batch["frames"][rows][mask],
        "frame_slot": mask.flatten().nonzero().squeeze(1),
        "video_mask": mask,
        "tasks": {"retrieval": {"text": batch["text"][rows], "present": mask.any(1)}},
    }


def _losses_and_gradients(ranks: Ranks, overrides: list[str]) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    config = resolve(["retrieval"], overrides=[*SETTINGS, *overrides])
    torch.manual_seed(0)
    model = VideoLanguageModel(config, ranks=ranks)
    loss = total_loss(model(part_of(global_batch(), ranks.share(BATCH))))
    loss.backward()
    gradients = {
        name: ranks.sum(parameter.grad) / ranks.world_size  # DeepSpeed's mean over ranks
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(ranks.sum(loss.detach()) / ranks.world_size), gradients, model.tasks["retrieval"].emcl.mu.clone()


@pytest.mark.parametrize("overrides", [[], ["model.temporal=mean", "emcl.temperature=0.1"]])
@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_every_gradient_agree_with_one_rank(world_size: int, overrides: list[str], tmp_path: Path) -> None:
    ((loss, gradients, state),) = run_on_ranks(_losses_and_gradients, 1, tmp_path, overrides)
    for part_loss, part_gradients, part_state in run_on_ranks(_losses_and_gradients, world_size, tmp_path, overrides):
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert part_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # key biases have a gradient of exactly zero, which only rounding fills
            difference = (part_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert difference < 1e-4, name
        torch.testing.assert_close(part_state, state, rtol=1e-4, atol=1e-7)


def test_loss_is_the_symmetric_cross_entropy() -> None:
    logits = torch.randn(6, 6)
    target = torch.arange(6)
    wanted = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(contrastive_loss(logits), wanted)


def test_logit_scale_stays_at_its_maximum_and_can_come_back() -> None:
    scale = torch.tensor([5.0], requires_grad=True)
    clamped = clamp_logit_scale(scale)
    assert float(clamped) == pytest.approx(4.6052, abs=1e-4)
    (-clamped).sum().backward(retain_graph=True)
    assert float(scale.grad) == 0  # a step would go further out
    scale.grad = None
    clamped.sum().backward()
    assert float(scale.grad) == 1  # a step comes back
