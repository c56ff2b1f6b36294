"""`emcl doctor` and `emcl bundle`, on a CPU: what they find, and that nothing a machine does ends the rest."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT, TINY, emcl_command, small
from emcl.cli import main
from emcl.config import resolve
from emcl.doctor import bundle as bundles
from emcl.doctor import exactness
from emcl.doctor.checks import Check, run_groups, table, write_json
from emcl.doctor.exactness import NO_CHANCE, compare
from emcl.doctor.trainers import ALL_TASKS, open_bench, settings
from emcl.errors import UserError
from emcl.multitask import VideoLanguageModel
from emcl.train.arithmetic import WORKSPACE
from emcl.train.flops import Flops

CPU = torch.device("cpu")


def test_it_trains_resumes_and_measures_here_and_leaves_a_report(sample_shards: Path, tmp_path: Path) -> None:
    groups = ("GPU beside CPU", "resuming", "augmentation", "comparing", "deterministic", "speed")
    done = emcl_command("doctor", "--shards", str(sample_shards), "--only", *groups, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert [check["figure"].partition(" of ")[0] for check in report["checks"]["resuming"]] == ["0", "0"]
    assert report["checks"]["GPU beside CPU"][0]["figure"] == "no GPU here"
    assert [check["figure"].endswith(" s") for check in report["checks"]["comparing"]] == [True, True]
    assert " of one without (spread " in report["checks"]["deterministic"][0]["figure"]
    assert not [check for checks in report["checks"].values() for check in checks if check["passed"] is False]
    assert report["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert "| speed | a bf16 product of this device |" in done.stdout and "% of this device's product" in done.stdout
    assert "step/s" not in done.stderr  # no bars
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "spede"], "--only spede: none of GPU beside CPU, "),
        (["--only", "speed", "--out", "."], "--out .: Is a directory"),
        (["--only", "speed", "--out", "file/doctor.json"], "--out file/doctor.json: "),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_first_check(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["doctor", *options]) == 2
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith(f"error: {said}") and "Traceback" not in output.err
    assert "failed" not in output.out


def test_cublas_workspace_is_set_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first product on a GPU settles that it is not, and `deterministic` raises at the later checks."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert main(["doctor", "--only", "speed", "--out", str(tmp_path)]) == 2
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACE


def test_the_compared_model_has_no_kinks_and_larger_blocks(sample_shards: Path) -> None:
    config = resolve(["msrvtt_qa"], "sample", [*small(sample_shards), "tasks.msrvtt_qa.answers=[red]"])
    torch.manual_seed(0)
    model = VideoLanguageModel(config)
    block = model.backbone.image.trunk.transformer.resblocks[0]
    matrix, bias = (weight.detach().clone() for weight in (block.mlp.c_fc.weight, block.mlp.c_fc.bias))
    assert any(isinstance(module, nn.ReLU) for module in model.modules())
    exactness._well_posed(model)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert torch.equal(block.mlp.c_fc.weight, 2 * matrix) and torch.equal(block.mlp.c_fc.bias, bias)


def test_folders_without_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train-\*.tar"):
        open_bench(tmp_path, tmp_path)


def test_a_group_that_raises_is_reported_and_the_others_go_on() -> None:
    def broken() -> Iterator[Check]:
        yield Check("first", "1")
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")

    kept = list[int]()
    outcomes = run_groups(
        {"a": broken, "b": lambda: iter([Check("second", "2", passed=True)])},
        60,
        lambda _: None,
        lambda known: kept.append(sum(map(len, known.values()))),
    )
    assert kept == [1, 3]  # after each check, with what had failed meanwhile
    assert [check.passed for check in outcomes["a"]] == [None, False]
    assert outcomes["a"][1].figure == "CUDA error: an illegal memory access" and "broken" in outcomes["a"][1].detail
    assert outcomes["b"][0].passed
    assert "| a | first | 1 |" in table(outcomes) and "FAILED" in table(outcomes)


def test_no_check_begins_once_its_time_is_over(tmp_path: Path) -> None:
    def slow() -> Iterator[Check]:
        for number in range(100):
            time.sleep(0.02)
            yield Check(str(number), "")

    outcomes = run_groups({"a": slow, "b": slow}, 0.1, lambda _: None)
    assert 2 <= len(outcomes["a"]) < 20 and "not run" in outcomes["a"][-1].figure
    assert outcomes["b"][0].name == "not run"
    write_json(tmp_path / "new" / "report.json", {"gpu": "none"}, outcomes)
    assert json.loads((tmp_path / "new" / "report.json").read_text())["machine"] == {"gpu": "none"}


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_two_devices_are_compared_by_features_similarity_loss_and_gradients(
    off: float, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device is this one with weights that are a thousandth off, or none."""
    bench = open_bench(tmp_path, sample_shards)
    config = settings(
        bench, *NO_CHANCE, f"model.name={TINY}", "data.image_size=32", "data.frames=3", "data.max_tokens=16",
        "data.batch_size=6", "emcl.bases=8", tasks=ALL_TASKS,
    )  # fmt: skip
    passes, calls = exactness._pass, []

    def second_is_off(model: torch.nn.Module, batch: object, device: torch.device) -> object:
        calls.append(device)
        if len(calls) == 2:
            for weight in model.parameters():
                weight.data *= 1 + off
        return passes(model, batch, device)  # type: ignore[arg-type]

    monkeypatch.setattr(exactness, "_pass", second_is_off)
    checks = list(compare(bench, config, "tiny", CPU, CPU))
    quantities = ("features", "similarity", "loss", "gradients")
    assert [check.name for check in checks] == [f"tiny: {quantity}" for quantity in quantities]
    assert [check.passed for check in checks] == [off == 0] * 4, checks


def test_flops_grow_with_frames_and_words_and_fall_with_a_frozen_tower(sample_shards: Path, tmp_path: Path) -> None:
    bench = open_bench(tmp_path, sample_shards)
    vit = Flops.of(
        settings(bench, "model.name=ViT-B-32", "data.image_size=224", "data.frames=1", "model.temporal=mean")
    )
    assert vit.video == pytest.approx(3 * 2 * 4.4e9, rel=0.05)  # 4.4 G multiplications an image (Dosovitskiy et al.)
    frozen = Flops.of(
        settings(bench, "model.name=ViT-B-32", "data.image_size=224", "data.frames=1", "model.temporal=mean",
                 "model.frozen=[image]")
    )  # fmt: skip
    assert frozen.video == pytest.approx(vit.video / 3)
    assert frozen.text == vit.text
    assert vit.of_step(frames=24, texts=2) == 24 * vit.video + 2 * vit.text


def test_the_small_bundle_leaves_out_pytorch_records_and_judges() -> None:
    names = bundles.closure(bundles.CHECKED, "3.12", without=bundles.required(bundles.AT_HAND, "3.12"))
    assert {"deepspeed", "av", "open-clip-torch", "webdataset", "timm", "omegaconf", "pydantic-core"} <= names
    assert not names & {"torch", "torchvision", "transformers", "numpy", "triton", "mlflow", "pycocoevalcap"}
    whole = bundles.closure([bundles.DISTRIBUTION], "3.12")
    assert names < whole and {"torch", "mlflow", "pycocoevalcap", "numpy"} <= whole


def test_a_bundle_holds_wheels_shards_and_the_script_that_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(*arguments: str) -> None:  # no test asks an index
        folder = Path(next(one for one in arguments if one.endswith("wheels")))
        (folder / f"{arguments[-1].partition('==')[0].rpartition('/')[2]}-1-py3-none-any.whl").touch()

    monkeypatch.setattr(bundles, "_pip", pip)
    monkeypatch.setattr(bundles, "CLIPS", {"train": 2, "val": 1, "test": 1})
    size = bundles.bundle(tmp_path / "my.bundle.tar", ROOT, full=False, python="3.12", machine="x86_64")
    assert size == (tmp_path / "my.bundle.tar").stat().st_size
    with tarfile.open(tmp_path / "my.bundle.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert (tmp_path / "emcl-bundle/shards/train-000000.tar").is_file()
    assert (tmp_path / "emcl-bundle/wheels/deepspeed-1-py3-none-any.whl").is_file()
    script = tmp_path / "emcl-bundle" / "check.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    monkeypatch.setattr(bundles, "SMALL_LIMIT", 1000)
    with pytest.raises(UserError, match="more than the 0 of a small bundle"):
        bundles.bundle(tmp_path / "big.tar", ROOT, full=False, python="3.12", machine="x86_64")
    with pytest.raises(UserError, match="wants the checkout"):
        bundles.bundle(tmp_path / "none.tar", tmp_path, full=False, python="3.12", machine="x86_64")
