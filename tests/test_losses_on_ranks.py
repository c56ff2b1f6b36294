"""The loss is a pure function of the global batch: N ranks give what one gives, EMCL on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emcl.config import resolve
from emcl.data.batch import Batch, VideoFrames
from emcl.data.captions import Captions
from emcl.distributed import ALONE, Ranks
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss
from emcl.multitask import VideoLanguageModel, total_loss
from ranks import run_on_ranks

BATCH = 8
TINY = str(Path(__file__).parent / "tiny_clip.json")
SETTINGS = [
    f"model.name={TINY}",
    "data.image_size=32",
    "data.frames=3",
    "data.max_tokens=12",
    f"data.batch_size={BATCH}",
]


def global_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(BATCH, 3, dtype=torch.bool)
    mask[2, 1:] = False  # a short video
    return {
        "frames": torch.randint(0, 256, (BATCH, 3, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "mask": mask,
        "text": torch.randint(1, 400, (BATCH, 12), generator=generator),
        "video": torch.tensor([0, 1, 2, 0, 3, 4, 1, 0]),  # some twice, also on different ranks
    }


def part_of(batch: dict[str, torch.Tensor], rows: slice) -> Batch:
    mask_BT = batch["mask"][rows]
    slots = mask_BT.flatten().nonzero().squeeze(1)
    return Batch(
        ids=[],
        rows=[],
        videos=VideoFrames(frames=batch["frames"][rows][mask_BT], slots=slots, mask_BT=mask_BT),
        video_B=batch["video"][rows],
        tasks={"retrieval": Captions(batch["text"][rows], mask_BT.any(1))},
    )


def _losses_and_gradients(ranks: Ranks, overrides: list[str]) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    config = resolve(["retrieval"], overrides=[*SETTINGS, *overrides])
    torch.manual_seed(0)
    model = VideoLanguageModel(config, ranks=ranks)
    loss = total_loss(model(batch=part_of(global_batch(), ranks.share(BATCH))))
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


def _published_gradients(ranks: Ranks, overrides: list[str]) -> dict[str, torch.Tensor]:
    """As published: every rank takes the loss of the gathered batch, in which its own slice alone has a gradient."""
    config = resolve(["retrieval"], overrides=[*SETTINGS, *overrides])
    torch.manual_seed(0)
    model = VideoLanguageModel(config)
    batch, own = global_batch(), ranks.share(BATCH)
    part = part_of(batch, own)
    frames_BTD, text_AD = model.encode(part).frames_BTD, model.backbone.encode_text(part.tasks["retrieval"].text)

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        everyone = [torch.empty_like(rows) for _ in range(ranks.world_size)]
        torch.distributed.all_gather(everyone, rows.detach())
        everyone[ranks.rank] = rows
        return torch.cat(everyone)

    losses = model.tasks["retrieval"](gathered(text_AD), gathered(frames_BTD), batch["mask"], batch["video"], ALONE)
    total_loss(losses).backward()
    return {
        name: ranks.sum(parameter.grad) / ranks.world_size  # as DistributedDataParallel
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_without_gathered_gradients_they_are_those_of_each_ranks_own_slice(tmp_path: Path) -> None:
    overrides = ["optim.gather_with_grad=false"]
    published = run_on_ranks(_published_gradients, 2, tmp_path, overrides)[0]
    loss, ours, _ = run_on_ranks(_losses_and_gradients, 2, tmp_path, overrides)[0]
    whole_loss, whole, _ = run_on_ranks(_losses_and_gradients, 1, tmp_path, [])[0]
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert ours.keys() == published.keys() == whole.keys()
    for name, gradient in published.items():
        size = gradient.norm().clamp_min(1e-6)
        assert (ours[name] - gradient).norm() / size < 1e-4, name
        share = 1.0 if name.endswith("logit_scale") else 0.5
        assert (share * whole[name] - gradient).norm() / size < 1e-4, name


def test_on_one_rank_there_is_no_slice(tmp_path: Path) -> None:
    one, other = (_losses_and_gradients(ALONE, [f"optim.gather_with_grad={choice}"]) for choice in ("true", "false"))
    assert one[0] == other[0] and all(torch.equal(one[1][name], gradient) for name, gradient in other[1].items())


def test_loss_is_the_symmetric_cross_entropy() -> None:
    logits = torch.randn(6, 6)
    target = torch.arange(6)
    wanted = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(contrastive_loss(logits), wanted)


VIDEOS = torch.tensor([0, 1, 0, 2, 1, 0])


def one_way(logits: torch.Tensor, present: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Row by row, of those that are there: the pair's own column against those of other videos."""
    losses = []
    for row in present.nonzero().flatten().tolist():
        others = [column for column in range(len(video)) if present[column] and video[column] != video[row]]
        losses.append(-torch.log_softmax(logits[row, [row, *others]], 0)[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("present", [[True] * 6, [True, True, False, True, True, True], [True, False, True] * 2])
def test_pairs_of_one_video_are_no_negatives_of_each_other(present: list[bool]) -> None:
    logits, mask = torch.randn(6, 6, requires_grad=True), torch.tensor(present)
    wanted = (one_way(logits, mask, VIDEOS) + one_way(logits.T, mask, VIDEOS)) / 2
    loss = contrastive_loss(logits, present_B=mask, video_B=VIDEOS)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    same = (VIDEOS[:, None] == VIDEOS[None, :]) & ~torch.eye(6, dtype=torch.bool)
    assert logits.grad is not None
    assert not logits.grad[same].any() and logits.grad[~same & mask[:, None] & mask[None, :]].all()


def test_of_different_videos_the_loss_is_the_same_to_the_bit() -> None:
    logits = 10 * torch.randn(8, 8)
    assert torch.equal(contrastive_loss(logits, video_B=torch.arange(8) - 2**62), contrastive_loss(logits))


def test_a_batch_of_one_video_alone_has_nothing_to_tell_apart() -> None:
    logits = torch.randn(3, 3, requires_grad=True)
    loss = contrastive_loss(logits, video_B=torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


def test_logit_scale_stays_at_its_maximum_and_can_come_back() -> None:
    scale = torch.tensor([5.0], requires_grad=True)
    clamped = clamp_logit_scale(scale)
    assert float(clamped) == pytest.approx(4.6052, abs=1e-4)
    (-clamped).sum().backward(retain_graph=True)
    assert float(scale.grad) == 0  # a step would go further out
    scale.grad = None
    clamped.sum().backward()
    assert float(scale.grad) == 1  # a step comes back
