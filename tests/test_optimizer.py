"""Parameter groups and schedule as EMCL-Net sets them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conftest import TINY
from emcl.config import resolve
from emcl.multitask import VideoLanguageModel
from emcl.train.bert_adam import BertAdam, BertAdamConfig, BertAdamKind
from emcl.train.optimizer import build_optimizer, parameter_groups
from emcl.train.schedule import build_schedule
from emcl.train.train_settings import OptimConfig

OPTIM = OptimConfig(lr=1e-3, backbone_lr=1e-5, weight_decay=0.2)


def grouped(*overrides: str, optim: OptimConfig = OPTIM) -> dict[str, dict[str, float]]:
    """Each trained parameter's name -> its group's rate and decay."""
    settings = [f"model.name={TINY}", "data.max_tokens=16", *overrides]
    model = VideoLanguageModel(resolve(["retrieval"], overrides=settings))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: {"lr": group["lr"], "decay": group["weight_decay"]}
        for group in parameter_groups(model.named_parameters(), optim)
        for parameter in group["params"]
    }


def test_clips_weights_learn_with_their_own_rate_and_new_ones_with_the_other() -> None:
    groups = grouped()
    for name, group in groups.items():
        of_clip = name.startswith(("backbone.image.trunk", "backbone.text.trunk"))
        assert group["lr"] == (1e-5 if of_clip else 1e-3), name
    assert groups["tasks.retrieval.logit_scale"]["lr"] == groups["backbone.temporal.positions"]["lr"] == 1e-3


def test_biases_norms_and_scales_do_not_decay() -> None:
    groups = grouped()
    for name, group in groups.items():
        single = name.endswith(("bias", "logit_scale", "class_embedding")) or ".ln_" in name
        assert group["decay"] == (0.0 if single else 0.2), name
    assert any(group["decay"] for group in groups.values())


def test_as_published_all_but_biases_decay_and_the_logit_scale_learns_as_clip_does() -> None:
    groups = grouped(optim=dataclasses.replace(OPTIM, decay="all_but_biases", logit_scale_lr=1e-5))
    for name, group in groups.items():
        assert group["decay"] == (0.0 if "bias" in name else 0.2), name
    assert groups["tasks.retrieval.logit_scale"] == {"lr": 1e-5, "decay": 0.2}
    assert groups["backbone.temporal.positions"]["lr"] == 1e-3


def test_frozen_weights_are_in_no_group() -> None:
    assert not [name for name in grouped("model.frozen=[image]") if name.startswith("backbone.image.trunk")]


def test_the_rate_rises_over_the_first_tenth_and_ends_at_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OPTIM, offload=False, fused=False)
    schedule = build_schedule(optimizer, OPTIM, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0
    assert rates[5] == pytest.approx(5e-4)
    assert max(rates) == rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [20, 25, 3945])
def test_the_published_rate_is_the_cosine_of_all_steps(steps: int) -> None:
    optim = dataclasses.replace(OPTIM, schedule="warmup_cosine")
    optimizer = build_optimizer(torch.nn.Linear(2, 2), optim, offload=False, fused=False)
    schedule = build_schedule(optimizer, optim, steps)
    for step in range(steps):
        progress = step / steps
        wanted = progress / 0.1 if progress < 0.1 else (1 + math.cos(math.pi * progress)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * wanted, rel=1e-12, abs=0)
        optimizer.step()
        schedule.step()


def bert_adam_by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, max_norm: float) -> None:
    """One operation after the other, each rounded in the weight's own format."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for gradient in gradients:
        weight.grad = gradient.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([weight], max_norm)
        mean.mul_(0.9).add_(weight.grad, alpha=0.1)
        square.mul_(0.98).addcmul_(weight.grad, weight.grad, value=1 - 0.98)
        update = mean / (square.sqrt() + 1e-6) + 0.2 * weight
        weight.add_(-(rate * update))


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1.0), (torch.float16, 1e-4), (torch.float16, 1e-2)])
def test_bert_adam_is_its_recurrence_to_the_bit(dtype: torch.dtype, size: float, clipped: bool) -> None:
    """In fp16 too, where squares of 1e-4 are 0, and rates of 1e-7 are nearly: each operation rounds as by hand."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3,), (64, 64)]
    weights = [(0.005 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    steps = [[(size * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes] for _ in range(5)]
    max_norm = size if clipped else 0.0
    ours = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = BertAdam(ours, lr=1e-7, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, max_norm=max_norm)
    for gradients in steps:
        for weight, gradient in zip(ours, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    largest = weights[2].clone()
    for number, weight in enumerate(weights):
        bert_adam_by_hand(weight, [gradients[number] for gradients in steps], 1e-7, max_norm)
        torch.testing.assert_close(ours[number].data, weight, rtol=0, atol=0)
    assert not torch.equal(weights[2], largest)


def test_a_second_cut_that_changes_nothing_is_left_out() -> None:
    weight = [torch.nn.Parameter(torch.ones(2))]
    for clip, cut in ((1.0, 0.0), (0.5, 0.0), (0.0, 1.0), (2.0, 1.0)):
        optim = dataclasses.replace(OPTIM, optimizer="bert_adam", grad_clip=clip)
        kind = BertAdamKind.build([{"params": weight}], optim, BertAdamConfig(), fused=False)
        assert kind.param_groups[0]["max_norm"] == cut
