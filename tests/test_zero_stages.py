"""ZeRO 0 to 3 and the precisions: the same training on two processes of DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import launch, losses, recorded, small

Weights = dict[str, torch.Tensor]


def trained(
    shards: Path, cwd: Path, *settings: str, ranks: int = 2, task: str = "retrieval"
) -> tuple[Weights, list[float]]:
    """Weights after three steps, and the three losses as MLflow has them."""
    cwd.mkdir(exist_ok=True)
    done = launch(
        "--task", task, *small(shards), "data.test=null", "data.val=null", "optim.max_steps=3", "name=run",
        "optim.lr=1e-3", "optim.backbone_lr=1e-3", *recorded(cwd), *settings, cwd=cwd, ranks=ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    by_step = losses(cwd)
    assert list(by_step) == [1, 2, 3]
    return load_file(cwd / "runs/run/best/model.safetensors"), list(by_step.values())


def same(one: tuple[Weights, list[float]], other: tuple[Weights, list[float]]) -> None:
    """Up to rounding: Adam divides by the gradient's size, which enlarges that of tiny gradients."""
    (weights, of_one), (others, of_other) = one, other
    assert of_one == pytest.approx(of_other, rel=1e-4)
    assert weights.keys() == others.keys()
    for name, value in others.items():
        if name.endswith("in_proj_bias"):  # the key bias has a gradient of exactly zero, which only rounding fills
            continue
        assert (weights[name] - value).norm() / value.norm().clamp_min(1e-6) < 1e-3, name


@pytest.fixture(scope="module")
def plain(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, list[float]]:
    """One process, no ZeRO."""
    return trained(sample_shards, tmp_path_factory.mktemp("zero0"), "deepspeed=deepspeed/zero0.json", ranks=1)


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_on_two_ranks_equal_those_on_one(
    stage: int, plain: tuple[Weights, list[float]], sample_shards: Path, tmp_path: Path
) -> None:
    same(trained(sample_shards, tmp_path, f"deepspeed=deepspeed/zero{stage}.json"), plain)


@pytest.mark.xdist_group("zero")
def test_micro_batches_are_contrasted_over_all_ranks(sample_shards: Path, tmp_path: Path) -> None:
    """Each by itself, whoever holds it: half of one rank's batch is what two ranks have of theirs."""
    halves = "optim.accumulation=2"
    one = trained(sample_shards, tmp_path / "one", halves, ranks=1)
    same(trained(sample_shards, tmp_path / "two", halves, "model.activation_checkpointing=true"), one)


@pytest.mark.xdist_group("zero")
def test_two_micro_batches_of_one_rank_are_the_batch_of_two_ranks(sample_shards: Path, tmp_path: Path) -> None:
    """Where samples are no negatives of each other, and each has the same number of questions."""
    settings = [f"tasks.msrvtt_qa.{term}" for term in ("dropout=0", "contrastive_weight=0", "questions_per_video=2")]
    one = trained(sample_shards, tmp_path / "one", *settings, "optim.accumulation=2", ranks=1, task="msrvtt_qa")
    same(trained(sample_shards, tmp_path / "two", *settings, task="msrvtt_qa"), one)


@pytest.mark.xdist_group("zero")
def test_the_published_question_answering_trains_alike_on_sharded_weights(sample_shards: Path, tmp_path: Path) -> None:
    """Its head reads a weight of the text tower, which ZeRO-3 gathers for the tower alone."""
    published = [
        "tasks.msrvtt_qa.head=reference", "tasks.msrvtt_qa.dropout=0", "model.temporal_projection=true",
        "data.pairs=question", "emcl.bases=16", "emcl.iterations=5", "emcl.beta=1",
    ]  # fmt: skip
    zero0, zero3 = (f"deepspeed=deepspeed/zero{stage}.json" for stage in (0, 3))
    one = trained(sample_shards, tmp_path / "one", *published, zero0, ranks=1, task="msrvtt_qa")
    same(trained(sample_shards, tmp_path / "two", *published, zero3, task="msrvtt_qa"), one)


@pytest.mark.xdist_group("zero")
def test_activations_computed_again_change_no_loss(
    plain: tuple[Weights, list[float]], sample_shards: Path, tmp_path: Path
) -> None:
    same(trained(sample_shards, tmp_path, "model.activation_checkpointing=true", ranks=1), plain)


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_step_gives_the_weights_that_it_gave_before(stage: int, sample_shards: Path, tmp_path: Path) -> None:
    zero = f"deepspeed=deepspeed/zero{stage}.json"
    before, _ = trained(sample_shards, tmp_path, zero, "checkpoint.every_steps=2", "checkpoint.keep=5")
    shutil.rmtree(tmp_path / "runs/run/checkpoints/step-00000003")
    shutil.rmtree(tmp_path / "runs/run/best")
    done = launch("--task", "retrieval", "--resume", "runs/run", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    after = load_file(tmp_path / "runs/run/best/model.safetensors")
    for name, value in before.items():
        assert (after[name] - value).abs().max() < 1e-6, name


@pytest.mark.xdist_group("zero")
def test_bf16_follows_fp32(plain: tuple[Weights, list[float]], sample_shards: Path, tmp_path: Path) -> None:
    weights, bf16_losses = trained(sample_shards, tmp_path, "precision=bf16")
    assert bf16_losses == pytest.approx(plain[1], rel=0.05)
    assert weights["tasks.retrieval.emcl.mu"].dtype.itemsize == 4


@pytest.mark.xdist_group("zero")
def test_compact_bases_train_on_two_ranks_as_on_one(sample_shards: Path, tmp_path: Path) -> None:
    compact = ["emcl.variant=compact", "emcl.bases=8", "emcl.beta=1"]
    one = trained(sample_shards, tmp_path / "one", *compact, ranks=1)
    two = trained(sample_shards, tmp_path / "two", *compact)
    assert two[1] == pytest.approx(one[1], rel=1e-4)
    name = "tasks.retrieval.emcl.gram"
    assert (two[0][name] - one[0][name]).norm() / one[0][name].norm() < 1e-3
