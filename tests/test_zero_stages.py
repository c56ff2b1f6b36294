"""ZeRO 0 to 3 and the precisions: the same training on two processes of DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import launch, small


def trained(shards: Path, cwd: Path, *settings: str, ranks: int = 2) -> tuple[dict, list[float]]:
    """Weights after three steps, and the three losses as MLflow has them."""
    from mlflow import MlflowClient

    done = launch(
        "--task", "retrieval", *small(shards), "data.test=null", "data.val=null", "optim.max_steps=3", "name=run",
        "optim.lr=1e-3", "optim.clip_lr=1e-3", "tracking.every_steps=1", *settings, cwd=cwd, ranks=ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sample").experiment_id])
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert len(losses) == 3
    return load_file(cwd / "runs/run/best/model.safetensors"), losses


@pytest.fixture(scope="module")
def plain(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[float]]:
    """One process, no ZeRO."""
    return trained(sample_shards, tmp_path_factory.mktemp("zero0"), "deepspeed=deepspeed/zero0.json", ranks=1)


@pytest.mark.xdist_group("zero")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_on_two_ranks_equal_those_on_one(
    stage: int, plain: tuple[dict, list[float]], sample_shards: Path, tmp_path: Path
) -> None:
    weights, losses = trained(sample_shards, tmp_path, f"deepspeed=deepspeed/zero{stage}.json")
    assert losses == pytest.approx(plain[1], rel=1e-4)
    assert weights.keys() == plain[0].keys()
    for name, value in plain[0].items():
        if name.endswith("in_proj_bias"):  # the key bias has a gradient of exactly zero, which only rounding fills
            continue
        difference = (weights[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert difference < 1e-3, name  # Adam divides by the gradient's size: rounding of tiny gradients is enlarged


@pytest.mark.xdist_group("zero")
def test_accumulated_steps_and_checkpointed_activations_train(sample_shards: Path, tmp_path: Path) -> None:
    _, losses = trained(sample_shards, tmp_path, "optim.accumulation=2", "model.activation_checkpointing=true")
    assert all(0 < loss < 5 for loss in losses)


@pytest.mark.xdist_group("zero")
def test_activations_computed_again_change_no_loss(
    plain: tuple[dict, list[float]], sample_shards: Path, tmp_path: Path
) -> None:
    _, losses = trained(sample_shards, tmp_path, "model.activation_checkpointing=true", ranks=1)
    assert losses == pytest.approx(plain[1], rel=1e-4)


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
def test_bf16_follows_fp32(plain: tuple[dict, list[float]], sample_shards: Path, tmp_path: Path) -> None:
    weights, losses = trained(sample_shards, tmp_path, "precision=bf16")
    assert losses == pytest.approx(plain[1], rel=0.05)
    assert weights["tasks.retrieval.emcl.mu"].dtype.itemsize == 4


@pytest.mark.xdist_group("zero")
def test_compact_bases_train_on_two_ranks_as_on_one(sample_shards: Path, tmp_path: Path) -> None:
    compact = ["emcl.variant=compact", "emcl.k=8", "emcl.beta=1"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, losses = trained(sample_shards, tmp_path / "one", *compact, ranks=1)
    two, others = trained(sample_shards, tmp_path / "two", *compact)
    assert others == pytest.approx(losses, rel=1e-4)
    name = "tasks.retrieval.emcl.gram"
    assert (two[name] - one[name]).norm() / one[name].norm() < 1e-3
