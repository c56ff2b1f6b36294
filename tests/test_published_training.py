"""Our Trainer takes the published code's own training steps: its golden runs, in fp32 and with CLIP in fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import emcl
from conftest import launch, shared, small
from emcl.errors import UserError
from emcl.train.run import run
from published_training import MATRICES, PUBLISHED, WITHOUT_EFFECT, golden_run, golden_settings, our_name
from ranks import run_on_ranks

HALF = ["precision=clip_fp16", "deepspeed=deepspeed/zero0.json"]


def ran(
    golden: str, ranks: int, shards: Path, folder: Path, *settings: str, task: str = "retrieval"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden run's numbers, and those of our run of it."""
    file = shared(f"golden/{golden}.npz")
    arguments = (file, shards, folder, list(settings), task)
    return dict(np.load(file)), run_on_ranks(golden_run, ranks, folder / "ranks", *arguments)[0]


def differences(golden: dict[str, Any], ours: dict[str, Any], task: str = "retrieval") -> dict[str, float]:
    """The largest of losses, of gradient norms (relative), of mu, and of all weights' norms after the last step
    (relative); `pytest -s` prints them."""
    norms = []
    for key, norm in golden.items():
        name = key.removeprefix("final_norm/")
        if key.startswith("final_norm/") and f"head/{name}" not in WITHOUT_EFFECT:
            weight = ours["weights"][our_name(name, task)]
            if "frame_position" in key:  # of positions in time, those that the published run has
                weight = weight[: len(golden["weights/positional_embedding"])]
            norms.append(abs(float(weight.float().norm()) / float(norm) - 1))
    assert len(norms) > 100
    found = {
        "losses": float(np.abs(np.array(ours["losses"]) - golden["losses"]).max()),
        "gradient norms": float(np.abs(np.array(ours["norms"]) / golden["gradient_norms"] - 1).max()),
        "mu": float(np.abs(ours["mu"].numpy() - golden["mu_after"]).max()),
        "final norms": max(norms),
    }
    print(f"\n{task}: " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()))
    return found


def check(golden: dict[str, Any], ours: dict[str, Any], task: str = "retrieval") -> None:
    found = differences(golden, ours, task)
    assert found["losses"] < 2e-5 and found["gradient norms"] < 1e-4
    assert found["mu"] < 1e-5 and found["final norms"] < 1e-5


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (2, 0), (2, 2)])
def test_twelve_steps_are_the_published_ones(ranks: int, stage: int, sample_shards: Path, tmp_path: Path) -> None:
    golden, ours = ran("training_reference", ranks, sample_shards, tmp_path, f"deepspeed=deepspeed/zero{stage}.json")
    check(golden, ours)
    if ranks == 1:
        np.testing.assert_allclose(ours["similarity"], golden["final/similarity"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_twelve_steps_of_question_answering_are_the_published_ones(
    ranks: int, sample_shards: Path, tmp_path: Path
) -> None:
    task, zero0 = "msrvtt_qa", "deepspeed=deepspeed/zero0.json"
    golden, ours = ran("training_reference_qa", ranks, sample_shards, tmp_path, zero0, task=task)
    check(golden, ours, task)
    trained = {our_name(str(name), task) for name in golden["trained"] if f"head/{name}" not in WITHOUT_EFFECT}
    assert trained == {name for name, weight in ours["weights"].items() if not torch.equal(weight, ours["begun"][name])}
    if ranks == 1:
        np.testing.assert_allclose(ours["logits"], golden["final/logits"], rtol=0, atol=1e-4)


def test_twelve_steps_with_clip_in_fp16_are_the_published_ones(sample_shards: Path, tmp_path: Path) -> None:
    golden, ours = ran("training_reference_half", 1, sample_shards, tmp_path, *HALF)
    found = differences(golden, ours)
    assert found["losses"] < 2e-3 and found["gradient norms"] < 1e-2
    assert found["mu"] < 1e-5 and found["final norms"] < 1e-3
    for name in ("clip.visual.proj", "clip.text_projection"):
        start = torch.from_numpy(golden[f"weights/{name.removeprefix('clip.')}"]).half().float()
        there = torch.from_numpy(golden[f"final_weight/{name}"]).float() - start
        here = ours["weights"][our_name(name, "retrieval")]
        assert here.dtype == torch.float16
        moved = here.float() - start
        assert moved.square().mean().sqrt() == pytest.approx(there.square().mean().sqrt(), rel=0.05)
        assert (moved * there).sum() / (moved.norm() * there.norm()) > 0.99  # and in the same direction


def test_only_clips_matrices_are_in_half_precision(sample_shards: Path, tmp_path: Path) -> None:
    golden, ours = ran("training_reference_half", 2, sample_shards, tmp_path, *HALF)
    assert differences(golden, ours)["losses"] < 2e-3  # on two ranks
    half = {name for name, weight in ours["weights"].items() if weight.dtype == torch.float16}
    assert half == {name for name in ours["weights"] if ".trunk." in name and any(part in name for part in MATRICES)}


def test_the_published_run_freezes_the_patch_convolution_alone(sample_shards: Path, tmp_path: Path) -> None:
    golden, ours = ran("training_reference", 1, sample_shards, tmp_path)
    still = [name for name, weight in ours["weights"].items() if torch.equal(weight, ours["begun"][name])]
    assert still == [our_name(str(name), "retrieval") for name in golden["frozen"]]
    assert golden_settings(golden)["steps"] == len(ours["losses"]) == 12


def test_a_published_run_goes_on_to_the_bit_and_its_scores_name_what_was_chosen(
    sample_shards: Path, tmp_path: Path
) -> None:
    own = [
        *small(sample_shards), *PUBLISHED, *HALF, "optim.logit_scale_lr=1e-7", "optim.gather_with_grad=false",
        "data.val=null", "optim.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=5", "name=run",
    ]  # fmt: skip
    done = launch("--task", "retrieval", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: precision=clip_fp16 is slow on a CPU" in done.stdout
    assert "trained on each rank's own slice of the gradient" in (tmp_path / "runs/run/retrieval-test.txt").read_text()
    whole = load_file(tmp_path / "runs/run/best/model.safetensors")
    assert whole["backbone.image.trunk.proj"].dtype == torch.float16

    for gone in ("checkpoints/step-00000004", "best"):
        (tmp_path / "runs/run" / gone).rename(tmp_path / gone.replace("/", "-"))
    done = launch("--task", "retrieval", "--resume", "runs/run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again = load_file(tmp_path / "runs/run/best/model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())

    done = launch("--task", "retrieval", "--resume", "runs/run", "optim.decay=matrices", cwd=tmp_path)
    assert "was begun with optim.decay=all_but_biases and does not go on with matrices" in done.stderr
    done = launch("--task", "retrieval", "--resume", "runs/run", "precision=fp32", cwd=tmp_path)
    assert "was begun with precision=clip_fp16 and does not go on with fp32" in done.stderr
    assert emcl.load(tmp_path / "runs/run", device="cpu").encode_text("a dog").dtype == torch.float32


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (["precision=clip_fp16"], "precision=clip_fp16 keeps no fp32 weights, as ZeRO 1 ("),
        (
            [*HALF, "model.name=tiny", "data.image_size=64"],
            "CLIPs of OpenAI's layout, which model.name=tiny is not",
        ),
        (
            [*HALF, "model.name=RN50", "data.image_size=224"],
            "CLIPs of OpenAI's layout, which model.name=RN50 is not",
        ),
        ([*HALF, "model.name=coca_ViT-B-32", "data.image_size=224"], "which model.name=coca_ViT-B-32 is not"),
        ([*HALF, "model.name=ViT-B-16-SigLIP", "data.image_size=224"], "which model.name=ViT-B-16-SigLIP is not"),
        (["optim.optimizer=bert_adam", "optim.grad_clip=0"], "cuts each weight's gradient to norm 1, which ZeRO 1"),
        (["optim.optimizer=bert_adam", "optim.grad_clip=5"], "cuts each weight's gradient to norm 1, which ZeRO 1"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    setting: list[str], said: str, sample_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        run(["retrieval"], overrides=[*small(sample_shards), f"runs={tmp_path}", *setting])
    assert said in str(refused.value) and "\n" not in str(refused.value)
