"""What a user can get wrong: one line that names the thing and the way out, exit code not 0, nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conftest import ROOT, launch, small
from emcl.errors import UserError
from emcl.train.run import run


def refused(cwd: Path, *arguments: str, ranks: int = 1) -> str:
    """The one line that the launch command says, with nothing left behind."""
    done = launch(*arguments, cwd=cwd, ranks=ranks)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert not (cwd / "runs").exists()
    assert not (cwd / "mlflow.db").exists()
    return errors[0]


@pytest.mark.xdist_group("bad")
def test_an_unknown_task_gets_the_nearest_name_and_the_list(tmp_path: Path) -> None:
    line = refused(tmp_path, "--task", "retreival")
    assert "retreival" in line
    assert "did you mean 'retrieval'" in line


@pytest.mark.xdist_group("bad")
def test_a_batch_that_the_ranks_do_not_divide_gets_one_that_they_do(sample_shards: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, "--task", "retrieval", *small(sample_shards), "data.batch_size=7", ranks=2)
    assert "data.batch_size=7" in line
    assert "take 8" in line or "take 6" in line


CASES = {
    "unknown key": (["optim.lrr=1"], ["optim.lrr", "did you mean 'lr'"]),
    "ill-typed": (["optim.epochs=many"], ["optim.epochs", "many"]),
    "no such choice": (["precision=fp8"], ["precision", "bf16"]),
    "fp16 on a CPU": (["precision=fp16"], ["fp16", "bf16"]),
    "not key=value": (["optim.lr"], ["optim.lr", "key=value"]),
    "unknown task setting": (["tasks.retrieval.wieght=1"], ["wieght", "weight"]),
    "no shard": (["data.train=nowhere/train-{000000..000003}.tar"], ["nowhere/train-", "emcl prepare"]),
    "remote shard": (["data.train=pipe:cat x.tar"], ["pipe:"]),
    "unknown model": (["model.name=ViT-B-33"], ["ViT-B-33", "did you mean"]),
    "no weights": (["model.name=ViT-B-32", "data.image_size=224", "model.pretrained=nowhere.pt"], ["nowhere.pt"]),
    "unknown DeepSpeed file": (["deepspeed=zero9"], ["zero9"]),
    "too few samples": (["data.batch_size=4096"], ["4096", "data.batch_size"]),
    "too many tokens": (["data.max_tokens=200"], ["data.max_tokens=200"]),
    "more bases than the width": (["emcl.variant=compact", "emcl.bases=5000"], ["emcl", "5000"]),
    "unknown part frozen": (["model.frozen=[imagination]"], ["imagination"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_setting_is_named_before_anything_is_written(
    case: str, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, named = CASES[case]
    with pytest.raises(UserError) as caught:
        run(["retrieval"], overrides=[*small(sample_shards), *overrides])
    message = str(caught.value)
    assert "\n" not in message
    for word in named:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "retreival"], "did you mean 'retrieval'"),
        (["--task", "retrieval", "optim.lrr=1"], "did you mean 'lr'"),
        (["--task", "retrieval", "tasks.retrieval.wieght=1"], "did you mean 'weight'"),
        (["--task", "all", "tasks.captioning.generation.num_beam=1"], "did you mean 'num_beams'"),
        (["--task", "all", "tasks.captioning.layers=three"], "tasks.captioning.layers"),
        (["--task", "all", "tasks.msrvtt_qa.fusion=sum"], "tasks.msrvtt_qa.fusion=sum is not one of concat, product"),
        (["--task", "retrieval", "tasks.retreival.weight=1"], "unknown task 'retreival'"),
        (["--task", "retrieval", "tasks=3"], "tasks"),
        (["--task", "retrieval", "model.name=ViT-B-33"], "did you mean 'ViT-B-32'"),
        (["--task", "retrieval", "deepspeed=zero9"], "did you mean 'zero"),
        (["--task", "retrieval", "data.train=shards/mine/a-*.tar"], "no shard matches shards/mine/a-*.tar"),
        (["--recipe", "msrvtt_retrieval"], "no shard matches shards/msrvtt/train"),
        (["--recipe", "sampel"], "did you mean 'sample'"),
        (["--help"], ""),
    ],
)
def test_an_early_error_and_help_import_no_torch(arguments: list[str], named: str, tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.stderr.write(f"torch: {'torch' in sys.modules}")
"""
    script = str(ROOT / "platform" / "launch.py")
    done = subprocess.run(
        [sys.executable, "-c", code, script, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.endswith("torch: False")
    assert ("error: " in done.stderr) == (arguments != ["--help"])
    assert named in done.stderr


def test_an_unknown_recipe_gets_the_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampel.*did you mean 'sample'"):
        run(["retrieval"], recipe="sampel")


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


SAMPLE = json.dumps({"id": "a", "captions": ["x"]}).encode()


def test_a_misspelt_test_set_is_named_and_no_sample_set_is_rendered_there(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="shrads/test.tar"):
        run(["retrieval"], overrides=[*small(sample_shards), "data.generate=true", "data.test=shrads/test.tar"])
    assert list(tmp_path.iterdir()) == []


def test_no_sample_set_is_rendered_among_the_shards_of_others(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"shards/mine/train-\*.tar"):
        run(["retrieval"], overrides=["data.train=shards/mine/train-*.tar", "data.val=null", "data.test=null"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("model.pretrained=nowhere.pt", "nowhere.pt"),
        ("data.test=nowhere/test.tar", "nowhere/test.tar"),
        ("optim.accumulation=3", "64 is not divisible by 1 ranks x 3 accumulation steps: take 63"),
    ],
)
def test_an_error_comes_before_the_sample_set_is_rendered(
    wrong: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        run(["retrieval"], overrides=[wrong])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"a.mp4": b"x", "a.json": SAMPLE, "b.mp4": b"x"}, ["b has no JSON"]),
        ({"a.json": SAMPLE}, ["a has no video"]),
        ({"a.mp4": b"x", "a.json": b"{"}, ["a.json", "not a sample's JSON"]),
        ({"a.mp4": b"x", "a.json": b"[]"}, ["a.json"]),
        ({"a.mp4": b"x", "a.avi": b"x", "a.json": SAMPLE}, ["two videos"]),
        ({}, ["no sample"]),
    ],
)
def test_a_shard_that_is_not_one_is_named(members: dict[str, bytes], named: list[str], tmp_path: Path) -> None:
    from emcl.data.shards import open_shards

    path = shard(tmp_path / "bad.tar", members)
    with pytest.raises(UserError) as caught:
        open_shards(str(path))
    for word in [*named, "bad.tar"]:
        assert word in str(caught.value)


def test_a_torn_shard_is_named(sample_shards: Path, tmp_path: Path) -> None:
    from emcl.data.shards import open_shards

    whole = (sample_shards / "train-000000.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"torn\.tar"):
        open_shards(str(tmp_path / "torn.tar"))


def test_a_checkpoint_of_another_architecture_is_named(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [*small(sample_shards), "optim.max_steps=1", "name=one"]
    run(["retrieval"], overrides=quick)
    wider = ["model.temporal_layers=3"]
    with pytest.raises(UserError, match="another architecture.*temporal"):
        run(["retrieval"], overrides=wider, evaluate_path=Path("runs/one"))
    with pytest.raises(UserError, match="step-00000001 does not fit this run"):
        run(["retrieval"], overrides=[*wider, "optim.epochs=3", "optim.max_steps=null"], resume="runs/one")
    with pytest.raises(UserError, match="no such directory"):
        run(["retrieval"], evaluate_path=Path("runs/two"))
    with pytest.raises(UserError, match="config.yaml"):
        run(["retrieval"], resume="runs/two")
