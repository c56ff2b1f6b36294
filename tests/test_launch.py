"""The user's own command from shards to the table: training on two processes, MLflow, resume, evaluation, export."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, deepspeed, emcl_command, launch, losses, mlflow_run, recorded, small
from emcl.cli import build_parser

pytestmark = pytest.mark.xdist_group("launch")


@dataclass
class Run:
    cwd: Path
    shards: Path
    output: str

    @property
    def folder(self) -> Path:
        return self.cwd / "runs" / "first"


@pytest.fixture(scope="module")
def run(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    cwd = tmp_path_factory.mktemp("launch")
    recorded = ["tracking.enabled=true", "tracking.every_steps=1"]  # in a store that the run itself makes
    settings = [*small(sample_shards), *recorded, "name=first", "checkpoint.every_steps=2"]
    done = deepspeed("--task", "retrieval", *settings, cwd=cwd, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(cwd, sample_shards, done.stdout + done.stderr)


def test_it_ends_with_the_table_the_files_and_how_to_open_mlflow(run: Run) -> None:
    for wanted in ("text_to_video", "video_to_text", "R@1", "MdR", "protocol:", "runs/first", "mlflow ui"):
        assert wanted in run.output


def test_the_bar_shows_loss_speed_and_waiting(run: Run) -> None:
    assert "samples/s" in run.output
    assert "waiting" in run.output
    assert "loss" in run.output


def test_mlflow_holds_parameters_metrics_commit_table_and_picture(run: Run) -> None:
    client, logged = mlflow_run(run.cwd)
    assert logged.info.run_name == "first"
    assert logged.data.params["emcl.bases"] == "32"
    assert logged.data.params["data.batch_size"] == "8"
    assert len(logged.data.tags["commit"]) >= 7
    assert logged.data.tags["benchmark"] == "sample"
    assert "ties count against" in logged.data.tags["test.retrieval.protocol"]
    assert list(losses(run.cwd)) == [1, 2, 3, 4, 5, 6]
    assert "val/retrieval/text_to_video/R1" in logged.data.metrics
    assert "test/retrieval/text_to_video/R1" in logged.data.metrics
    files = {item.path for item in client.list_artifacts(logged.info.run_id)}
    assert {"config.yaml", "retrieval-test.png", "retrieval-test.txt", "scores-test.json"} <= files


def test_the_newest_checkpoints_are_kept(run: Run) -> None:
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_export_opens_without_deepspeed_and_compares(run: Run) -> None:
    code = (
        "import sys, emcl, numpy as np\n"
        f"m = emcl.load({str(run.folder)!r})\n"
        "v = m.encode_video([np.zeros((5, 40, 60, 3), np.uint8), np.full((2, 64, 32, 3), 200, np.uint8)])\n"
        "s = m.similarity(['a red circle moves left', 'two objects', 'x'], v)\n"
        "assert tuple(s.shape) == (3, 2) and s.isfinite().all()\n"
        "assert m.encode_text(['one']).shape == (1, 32)\n"
        "assert not any(name.startswith(('deepspeed', 'mlflow')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=run.cwd)


def test_files_and_frames_of_a_video_get_the_same_embedding_as_in_training(run: Run) -> None:
    import emcl
    from emcl.data.decode import decode
    from emcl.data.shards import open_shards

    model = emcl.load(run.folder)
    shards = open_shards(f"{run.shards}/test-000000.tar")
    video = shards.read(shards.rows[0])
    path = run.cwd / "clip.mp4"
    path.write_bytes(video)
    from_file = model.encode_video(path)
    from_frames = model.encode_video(decode(video, frames=3, size=32))
    torch.testing.assert_close(from_file.frames, from_frames.frames)


def test_evaluating_the_run_gives_its_own_scores_again(run: Run, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run.folder, copied)
    before = json.loads((run.folder / "scores-test.json").read_text())
    quiet = ["evaluate.dsl=true", "tracking.enabled=false"]
    done = launch("--task", "retrieval", "--evaluate", str(copied), *quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transductive" in done.stdout
    after = json.loads((copied / "scores-test.json").read_text())
    for name, value in before["tasks"]["retrieval"]["metrics"].items():
        assert after["tasks"]["retrieval"]["metrics"][name] == pytest.approx(value, abs=1e-3), name


def test_resume_goes_on_to_more_epochs(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "runs/first")
    longer = ["optim.epochs=3", "tracking.enabled=false"]
    done = launch("--task", "retrieval", "--resume", "runs/first", *longer, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/first/checkpoints/step-00000009/manifest.json").is_file()
    output = done.stdout + done.stderr
    assert "6/9" in output
    assert "0/9" not in output


def test_no_argument_and_no_environment_variable_are_needed(sample_shards: Path, tmp_path: Path) -> None:
    """Word for word, with the sample recipe's shards where the recipe looks for them."""
    folder = tmp_path / "shards" / "sample"
    folder.mkdir(parents=True)
    for shard in sample_shards.glob("*.tar"):
        (folder / shard.name).symlink_to(shard)
    for number in range(2, 4):
        (folder / f"train-{number:06d}.tar").symlink_to(sample_shards / "train-000000.tar")
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["deepspeed", str(ROOT / "platform/launch.py"), "--task", "retrieval", "data.batch_size=16"]
    short = ["optim.max_steps=2", "tracking.enabled=false"]
    done = subprocess.run(
        [*command, *short], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "text_to_video" in done.stdout


def test_nothing_is_compiled_to_train_on_cpus(sample_shards: Path, tmp_path: Path) -> None:
    """Nor waited for: a build that was killed leaves a lock, for which PyTorch waits without end."""
    operators = tmp_path / "extensions"
    build = operators / "deepspeed_shm_comm"
    build.mkdir(parents=True)
    (build / "lock").touch()
    before = set(Path("/dev/shm").glob("deepspeed*"))
    short = [*small(sample_shards), "optim.max_steps=2", "data.test=null", "name=run"]
    env = {"TORCH_EXTENSIONS_DIR": str(operators)}
    done = deepspeed("--task", "retrieval", *short, cwd=tmp_path, ranks=2, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in operators.rglob("*")] == ["deepspeed_shm_comm", "lock"]
    assert set(Path("/dev/shm").glob("deepspeed*")) <= before


def test_an_unreachable_mlflow_server_is_named_at_the_start_and_the_local_store_serves(
    sample_shards: Path, tmp_path: Path
) -> None:
    settings = [*small(sample_shards), "data.val=null", "data.test=null", "optim.max_steps=1", *recorded(tmp_path)]
    done = launch("--task", "retrieval", *settings, cwd=tmp_path, env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert "http://127.0.0.1:9 does not answer" in output
    assert output.index("does not answer") < output.index("training:")
    assert list(losses(tmp_path)) == [1]


def test_the_picture_is_a_picture(run: Run) -> None:
    from PIL import Image

    pixels = np.asarray(Image.open(run.folder / "retrieval-test.png").convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.std() > 10


def test_the_commands_are_a_map_and_training_is_one_of_them(tmp_path: Path) -> None:
    shown = build_parser().format_help()
    ways = ("train", "evaluate", "prepare", "verify", "report", "index", "search", "caption", "ask", "serve")
    assert all(re.search(rf"^    {way} ", shown, re.MULTILINE) for way in ways)
    done = emcl_command("evaluate", "nowhere", "optim.lr=1", cwd=tmp_path)
    assert done.returncode != 0 and "nowhere: no such directory" in done.stdout + done.stderr
    done = emcl_command("tasks", "optim.lr=1", cwd=tmp_path)
    assert done.returncode == 2 and "unrecognized arguments: optim.lr=1" in done.stderr
