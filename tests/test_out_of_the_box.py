"""`emcl transform`: EMCL on two feature files of any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import emcl
from emcl.cli import main
from emcl.cli_features import USUAL
from emcl.model.emcl_layer import INFERENCE_MODULE


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


def test_the_usual_values_are_those_of_the_library() -> None:
    """The command has its own, since it tells them in its help before PyTorch is loaded."""
    assert USUAL["compact"] == INFERENCE_MODULE
    assert USUAL["shared"]["bases"] == emcl.SharedFactors().bases


def call_shared(files: dict[str, str], *more: str, out: Path) -> int:
    fit = ["--fit-video", files["video_fit"], "--fit-text", files["text_fit"]]
    return call(files, "--variant", "shared", *([] if "--load" in more else fit), *more, out=out)


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


def test_factors_of_pairs_raise_recall_and_their_codes_are_written(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts in a space of their own, where cosines say nothing."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(128, 128)))[0].astype(np.float32)
    for split in ("fit", "test"):
        np.save(files[f"text_{split}"], np.load(files[f"text_{split}"]) @ turn)
    assert call_shared(files, out=tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "128 factors of 200 pairs, shrinkage" in output
    for direction in ("text_to_video", "video_to_text"):
        assert recall_at_1(output, f"{direction}, factors") > 40 > 5 > recall_at_1(output, f"{direction}, cosine")
    factors = emcl.SharedFactors.load(tmp_path / "out" / "factors.npz")
    video, text = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("video", "text"))
    ours = factors.transform(np.load(files["video_test"]), np.load(files["text_test"]))
    test = np.load(files["text_test"]), np.load(files["video_test"])
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in test]
    scores = 3 * unit[0] @ unit[1].T + factors.score(*test)
    assert call_shared(files, "--logit-scale", "3", out=tmp_path / "out") == 0
    output = capsys.readouterr().out
    found = 100 * (scores.argmax(1) == np.arange(100)).mean(), 100 * (scores.argmax(0) == np.arange(100)).mean()
    assert recall_at_1(output, "text_to_video, both") == found[0] != recall_at_1(output, "text_to_video, factors")
    assert recall_at_1(output, "video_to_text, both") == found[1]
    np.testing.assert_array_equal(video, ours[0])
    np.testing.assert_array_equal(text, ours[1])
    assert video.shape == (100, 128) and video.dtype == np.float32


def test_saved_factors_serve_again(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_shared(files, "--bases", "8", "--shrinkage", "2", "0.5", out=tmp_path / "one") == 0
    once = capsys.readouterr().out
    assert "8 factors of 200 pairs, shrinkage 2 and 0.5" in once
    assert call_shared(files, "--load", str(tmp_path / "one" / "factors.npz"), out=tmp_path / "two") == 0
    assert capsys.readouterr().out == once.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (tmp_path / "one" / "text.npy").read_bytes() == (tmp_path / "two" / "text.npy").read_bytes()


def test_factors_of_the_very_pairs_show_no_recall(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(files, "--variant", "shared", out=tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "their recall would say nothing" in output and "R@1" not in output
    assert (tmp_path / "out" / "factors.npz").is_file()


def test_one_pair_has_nothing_to_share(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("video_fit", "text_fit"):
        np.save(files[name], np.load(files[name])[:1])
    assert call_shared(files, out=tmp_path / "out") == 2
    assert "1 videos and 1 texts have no two pairs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_factors_of_modalities_of_different_widths_with_several_texts_a_video(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("fit", "test"):
        text = np.load(files[f"text_{split}"])
        np.save(tmp_path / f"text-{split}.npy", np.repeat(text[:, :60], 2, axis=0))
        np.save(tmp_path / f"owner-{split}.npy", np.repeat(np.arange(len(text)), 2))
    owners = ["--fit-video-of-text", str(tmp_path / "owner-fit.npy")]
    assert call_shared(files, "--video-of-text", str(tmp_path / "owner-test.npy"), out=tmp_path / "out") == 2
    assert "--fit-video-of-text FILE.npy" in capsys.readouterr().err
    owners += ["--video-of-text", str(tmp_path / "owner-test.npy")]
    assert call_shared(files, *owners, out=tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "60 factors of 200 pairs" in output and "cosine" not in output
    assert call_shared(files, *owners, "--logit-scale", "3", out=tmp_path / "out") == 2
    assert "--logit-scale is for features of one space" in capsys.readouterr().err
    assert recall_at_1(output, "text_to_video, factors") > 10


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--beta", "1"], "--beta is an option of --variant compact"),
        (["--variant", "compact", "--shrinkage", "1", "1"], "--shrinkage is an option of --variant shared"),
        (["--variant", "compact", "--logit-scale", "1"], "--logit-scale is an option of --variant shared"),
        (["--variant", "compact", "--fit-video-of-text", "owner.npy"], "goes with --variant shared"),
        (["--load", "factors.npz", "--bases", "3"], "leave out --bases"),
        (["--load", "nope.npz"], "nope.npz: No such file"),
        (["--load", "video-test.npy"], "video-test.npy holds no shared factors"),
        (["--load", "."], "Is a directory"),
        (["--load", "narrow.npz"], "video features are (n, 4) as those fitted, not (100, 128)"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    more: list[str],
    said: str,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    emcl.SharedFactors().fit(np.eye(4), np.eye(4)).save("narrow.npz")
    assert call_shared(files, *more, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
