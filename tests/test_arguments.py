"""Numbers among the commands' options: the range is said, before anything is read or imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from emcl.cli import build_parser, main

FOLDER = ["prepare", "folder", "--videos", "v", "--annotations", "a.csv", "--out", "o"]
INDEX = ["index", "v", "--model", "m", "--out", "i"]
SERVE = ["serve", "i", "--model", "m"]
TRANSFORM = ["transform", "--video", "v", "--text", "t", "--out", "o"]
WRONG = [
    (["prepare", "sample", "--seed", "-1"], "--seed: -1 is not a whole number from 0 to below 4294967296"),
    (["prepare", "sample", "--processes", "0"], "--processes: 0 is not a whole number from 1 up"),
    ([*FOLDER, "--shard-size", "0"], "--shard-size: 0 is not a whole number from 1 up"),
    ([*FOLDER, "--shard-size", "2.5"], "--shard-size: 2.5 is not a whole number"),
    ([*FOLDER, "--short-side", "1"], "--short-side: 1 is not a whole number from 2 up"),
    ([*FOLDER, "--fps", "0"], "--fps: 0 is not a number above 0"),
    ([*FOLDER, "--fps", "nan"], "--fps: nan is not a number above 0"),
    ([*FOLDER, "--fps", "inf"], "--fps: inf is not a number above 0"),
    ([*FOLDER, "--size", "4097"], "--size: 4097 is not a whole number from 1 to 4096"),
    ([*FOLDER, "--quality", "96"], "--quality: 96 is not a whole number from 1 to 95"),
    ([*FOLDER, "--processes", "-1"], "--processes: -1 is not a whole number from 1 up"),
    ([*TRANSFORM, "--bases", "0"], "--bases: 0 is not a whole number from 1 up"),
    ([*TRANSFORM, "--beta", "-0.5"], "--beta: -0.5 is not a number from 0 up"),
    ([*TRANSFORM, "--balance", "1.5"], "--balance: 1.5 is not a number from 0 to 1"),
    (["options", "r", "--bank", "0"], "--bank: 0 is not a whole number from 1 up"),
    (["doctor", "--minutes", "0"], "--minutes: 0 is not a number above 0"),
    (["doctor", "--minutes", "nan"], "--minutes: nan is not a number above 0"),
    ([*INDEX, "--window", "0"], "--window: 0 is not a number above 0"),
    ([*INDEX, "--overlap", "-1"], "--overlap: -1 is not a number from 0 up"),
    (["search", "i", "a", "--model", "m", "--top", "0"], "--top: 0 is not a whole number from 1 up"),
    (["ask", "f", "q", "--model", "m", "--top", "-1"], "--top: -1 is not a whole number from 1 up"),
    ([*SERVE, "--port", "65536"], "--port: 65536 is not a whole number from 0 to below 65536"),
    ([*SERVE, "--queue", "0"], "--queue: 0 is not a whole number from 1 up"),
    ([*SERVE, "--max-upload", "0"], "--max-upload: 0 is not a number above 0"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_a_number_out_of_its_range_is_refused_with_the_range(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"error: argument {said}") and complaint.count("\n") == 1


def test_defaults_and_ordinary_values_are_taken() -> None:
    parser = build_parser()
    assert parser.parse_args([*FOLDER, "--fps", "2.5", "--processes", "3"]).fps == 2.5
    arguments = parser.parse_args([*INDEX, "--window", "6", "--overlap", "0"])
    assert (arguments.window, arguments.overlap) == (6.0, 0.0)


def test_windows_that_never_advance_are_refused(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(tmp_path), "--model", "m", "--out", "i", "--window", "5", "--overlap", "5"]) == 2
    assert "--overlap 5 is not below --window 5" in capsys.readouterr().err


def test_the_parser_alone_imports_no_torch() -> None:
    code = "import sys; from emcl.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
