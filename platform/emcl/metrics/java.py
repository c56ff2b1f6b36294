"""Runs the Java programs of pycocoevalcap in separate processes, which may hang or die without harm.

`python -m emcl.metrics.java ptb|meteor` reads JSON from standard input and writes JSON to standard output.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

OLDEST = 8
"""The Java version that both programs were compiled for."""
TIMEOUT = 60.0
"""Seconds for a program to start and answer a small request; PER_SENTENCE is added for each sentence."""
PER_SENTENCE = 0.05

Captions = Mapping[str, Sequence[str]]


class JavaError(Exception):
    """A program failed; the message is one line."""


@dataclass(frozen=True)
class Java:
    path: str
    version: int


@lru_cache(maxsize=1)
def find_java() -> Java | str:
    """The machine's Java, or a short text on what is missing."""
    path = shutil.which("java")
    if path is None:
        return "no Java (apt-get install default-jre-headless)"
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Java at {path} does not run: {error}"
    version_match = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr + done.stdout)
    if done.returncode or not version_match:
        return f"Java at {path} does not run: {(done.stderr or done.stdout).strip()[:100]}"
    major = int(version_match[2] or 0) if version_match[1] == "1" else int(version_match[1])  # 1.8 is 8
    if major < OLDEST:
        return f"Java {major} at {path} is too old: {OLDEST} or newer is wanted (apt-get install default-jre-headless)"
    return Java(path, major)


def ptb_tokens(captions: Captions, *, timeout: float | None = None) -> dict[str, list[str]]:
    """Tokenises captions with pycocoevalcap's PTB tokenizer: lower case, no punctuation, separated by spaces.

    Raises:
        JavaError: the program is missing, died, or took too long.
    """
    return _call("ptb", {"captions": captions}, _patience(captions, timeout))


def meteor(hypotheses: Mapping[str, str], references: Captions, *, timeout: float | None = None) -> float:
    """METEOR of tokenised captions.

    Raises:
        JavaError: the program is missing, died, or took too long.
    """
    content = {"hypotheses": hypotheses, "references": references}
    return _call("meteor", content, _patience(references, timeout))["score"]


def _patience(captions: Captions, timeout: float | None) -> float:
    return TIMEOUT + PER_SENTENCE * sum(map(len, captions.values())) if timeout is None else timeout


def _call(program: str, content: Any, timeout: float) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-m", "emcl.metrics.java", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(json.dumps(content), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise JavaError(f"{program} did not answer within {timeout:.0f} s") from None
    finally:
        if process.poll() is None:  # Java is its child and would outlive it
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        last = error.strip().splitlines()[-1] if error.strip() else f"exit {process.returncode}"
        raise JavaError(f"{program} failed: {last[:200]}")
    return json.loads(out)


def _main(program: str) -> None:
    content = json.load(sys.stdin)
    if program == "ptb":
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # a line break within a caption would shift all captions after it
        wrapped = {
            key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in content["captions"].items()
        }
        tokens = PTBTokenizer().tokenize(wrapped)
        if {key: len(lines) for key, lines in tokens.items()} != {key: len(texts) for key, texts in wrapped.items()}:
            sys.exit("the tokenizer gave other lines than it was given")  # its own exit status is not checked
        print(json.dumps(tokens))
    else:
        from pycocoevalcap.meteor.meteor import Meteor

        hypotheses = {key: [text] for key, text in content["hypotheses"].items()}
        score, _ = Meteor().compute_score(content["references"], hypotheses)
        print(json.dumps({"score": float(score)}))


if __name__ == "__main__":
    _main(sys.argv[1])
