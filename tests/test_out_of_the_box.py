"""`emcl transform`: EMCL on two feature files of any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import emcl
from emcl.cli import main


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs that share 16 strong directions under noise in 128; a training part and a test part."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(300, 16)) @ rng.normal(size=(16, 128))
    made = {}
    for name in ("video", "text"):
        rows = (shared + 6 * rng.normal(size=shared.shape) + rng.normal(size=128)).astype(np.float32)
        for split, cut in (("fit", rows[:200]), ("test", rows[200:])):
            np.save(tmp_path / f"{name}-{split}.npy", cut)
            made[f"{name}_{split}"] = str(tmp_path / f"{name}-{split}.npy")
    return made


def call(files: dict[str, str], *more: str, out: Path) -> int:
    return main(["transform", "--video", files["video_test"], "--text", files["text_test"], "--out", str(out), *more])


def recall_at_1(output: str, line: str) -> float:
    (row,) = [text for text in output.splitlines() if text.startswith(line)]
    return float(row.split()[2])


def test_recall_before_and_after_and_the_transformed_features(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["--fit-video", files["video_fit"], "--fit-text", files["text_fit"], "--bases", "16", "--beta", "4"]
    assert call(files, *fit, out=tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "transductive" not in output
    for direction in ("text_to_video", "video_to_text"):
        assert recall_at_1(output, f"{direction}, after") > recall_at_1(output, f"{direction}, before")
    layer = emcl.EMCL.load(tmp_path / "out" / "bases.pt")
    alone = layer.transform(np.load(files["text_test"])[:1])
    among_others = np.load(tmp_path / "out" / "text.npy")[:1]
    assert np.linalg.norm(alone - among_others) < 1e-6 * np.linalg.norm(alone)


def test_bases_fitted_to_the_scored_features_are_called_transductive(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(files, "--bases", "8", out=tmp_path / "out") == 0
    assert "transductive" in capsys.readouterr().out


def test_saved_bases_serve_again(files: dict[str, str], tmp_path: Path) -> None:
    assert call(files, "--bases", "8", out=tmp_path / "one") == 0
    assert call(files, "--load", str(tmp_path / "one" / "bases.pt"), out=tmp_path / "two") == 0
    assert np.array_equal(np.load(tmp_path / "one" / "video.npy"), np.load(tmp_path / "two" / "video.npy"))


def test_several_texts_of_a_video(files: dict[str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.repeat(np.load(files["text_test"]), 2, axis=0))
    np.save(tmp_path / "owner.npy", np.repeat(np.arange(100), 2))
    files["text_test"] = str(tmp_path / "text.npy")
    assert call(files, out=tmp_path / "out") == 2
    assert call(files, "--video-of-text", str(tmp_path / "owner.npy"), out=tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[0], "shape (128,)"),
        (lambda rows: np.where(np.arange(128) == 3, np.nan, rows), "row 0 is not finite"),
        (lambda rows: rows[:, :64], "width"),
        (lambda rows: rows.astype(str), "wanted are feature rows"),
    ],
)
def test_bad_features_are_refused_in_one_line(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, said: str
) -> None:
    np.save(tmp_path / "bad.npy", change(np.load(files["video_test"])))  # type: ignore[operator]
    files["video_test"] = str(tmp_path / "bad.npy")
    assert call(files, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pickled_array_is_not_opened(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    files["video_test"] = str(tmp_path / "evil.npy")
    assert call(files, out=tmp_path / "out") == 2
    assert "not a NumPy array" in capsys.readouterr().err


def test_more_bases_than_the_width_are_refused(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(files, "--bases", "500", out=tmp_path / "out") == 2
    assert "500 of 128" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("nope.pt", "no such file"), ("video-test.npy", "holds no EMCL bases")])
def test_a_file_that_holds_no_bases_is_refused_in_one_line(
    name: str, said: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(files, "--load", str(tmp_path / name), out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
