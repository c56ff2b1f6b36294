"""Parameter groups and schedule as EMCL-Net sets them."""

from __future__ import annotations

import pytest
import torch

from conftest import TINY
from emcl.config import resolve
from emcl.multitask import VideoLanguageModel
from emcl.train.optimizer import build_optimizer, parameter_groups
from emcl.train.schedule import build_schedule
from emcl.train.train_settings import OptimConfig

OPTIM = OptimConfig(lr=1e-3, backbone_lr=1e-5, weight_decay=0.2)


def grouped(*overrides: str) -> dict[str, dict[str, float]]:
    """Each trained parameter's name -> its group's rate and decay."""
    settings = [f"model.name={TINY}", "data.max_tokens=16", *overrides]
    model = VideoLanguageModel(resolve(["retrieval"], overrides=settings))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: {"lr": group["lr"], "decay": group["weight_decay"]}
        for group in parameter_groups(model.named_parameters(), OPTIM)
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
