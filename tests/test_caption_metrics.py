"""Caption scores: the published ones, pycocoevalcap's own, and machines whose Java is missing, hangs or dies."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from conftest import ends, launch, shared, small
from emcl.metrics import java
from emcl.metrics.caption_metrics import caption_metrics, plain_tokens

HYPOTHESES = {"a": "A man's dog runs, in the park!", "b": "two people are cooking food"}
REFERENCES = {"a": ["The dog is running in a park.", "a dog runs"], "b": ["People cook.", "two cooks, cooking a meal"]}

needs_java = pytest.mark.skipif(isinstance(java.find_java(), str), reason=str(java.find_java()))


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `java` of one's own writing, first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    java.find_java.cache_clear()
    yield tmp_path / "java"
    java.find_java.cache_clear()


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@needs_java
def test_the_published_scores() -> None:
    golden = json.loads(shared("golden/captions_nlgeval.json").read_text())
    hypotheses = {str(number): text for number, text in enumerate(golden["hypotheses"])}
    references = {str(number): texts for number, texts in enumerate(golden["references"])}
    scores = caption_metrics(hypotheses, references, tokenizer="given")
    assert scores.metrics == pytest.approx(golden["scores"], abs=1e-5)


@needs_java
def test_pycocoevalcaps_own_scores_of_real_captions() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    from emcl.prepare.msrvtt import read

    clips = read(shared("data/msrvtt"), "official")
    sentences = {clip.id: clip.captions for clip in clips if clip.split == "test"}
    chosen = sorted(sentences)[:60]
    hypotheses = {key: sentences[key][0] for key in chosen}
    references = {key: sentences[key][1:] for key in chosen}
    tokenizer = PTBTokenizer()
    theirs = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    ours = tokenizer.tokenize({key: [{"caption": text}] for key, text in hypotheses.items()})
    bleu = Bleu(4).compute_score(theirs, ours, verbose=0)[0]
    wanted = {f"BLEU-{n}": score for n, score in enumerate(bleu, 1)}
    for name, metric in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        wanted[name] = metric.compute_score(theirs, ours)[0]
    scores = caption_metrics(hypotheses, references)
    assert scores.tokenizer == "ptb"
    assert scores.metrics == pytest.approx(wanted, abs=1e-9)


@needs_java
def test_line_breaks_within_a_caption_shift_no_other() -> None:
    broken = {**HYPOTHESES, "a": "A man's dog\nruns,\u2028in the\r park!"}
    assert caption_metrics(broken, REFERENCES).metrics == caption_metrics(HYPOTHESES, REFERENCES).metrics


def test_without_java_a_plain_tokenizer_serves_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    java.find_java.cache_clear()
    scores = caption_metrics(HYPOTHESES, REFERENCES)
    java.find_java.cache_clear()
    assert scores.tokenizer == "plain"
    assert set(scores.metrics) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    assert scores.missing is not None and "apt-get install" in scores.missing


def test_too_old_a_java_is_named(fake_java: Path) -> None:
    write(fake_java, "echo 'java version \"1.6.0_45\"' >&2")
    assert "Java 6" in str(java.find_java())


def test_a_java_that_dies_costs_the_scores_that_need_it_alone(fake_java: Path) -> None:
    write(fake_java, 'case "$*" in -version) echo \'openjdk version "17.0.1"\' >&2;; *) exit 3;; esac')
    scores = caption_metrics(HYPOTHESES, REFERENCES)
    assert scores.tokenizer == "plain" and "METEOR" not in scores.metrics
    assert scores.missing is not None and "failed" in scores.missing


def test_a_java_that_hangs_is_ended_with_its_children(fake_java: Path, tmp_path: Path) -> None:
    write(fake_java, f"echo $$ > {tmp_path}/pid; sleep 600")
    with pytest.raises(java.JavaError, match="did not answer"):
        java.meteor({"a": "a dog"}, {"a": ["a dog"]}, timeout=10)
    with suppress(psutil.NoSuchProcess):
        assert ends(psutil.Process(int((tmp_path / "pid").read_text())))


def test_plain_tokens() -> None:
    assert plain_tokens("A man's Dog -- runs, twice!") == "a man's dog runs twice"


def test_both_sides_must_be_of_the_same_videos() -> None:
    with pytest.raises(ValueError, match="same videos"):
        caption_metrics({"a": "x"}, {"b": ["x"]})
    with pytest.raises(ValueError, match="references"):
        caption_metrics({"a": "x"}, {"a": []})


def test_a_run_says_at_its_start_what_its_captions_will_be_scored_without(
    fake_java: Path, sample_shards: Path, tmp_path: Path
) -> None:
    write(fake_java, "echo 'java version \"1.6.0_45\"' >&2")
    settings = [*small(sample_shards), "data.val=null", "optim.max_steps=1"]
    tiny = ["tasks.captioning.width=64", "tasks.captioning.layers=1", "tasks.captioning.generation.max_new_tokens=4"]
    done = launch("--task", "captioning", *settings, *tiny, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "note: captions will be scored without METEOR" in output and "Java 6" in output
    assert output.index("note: captions") < output.index("training:")


def test_bleu_of_summed_counts_is_that_of_the_corpus_and_has_an_interval() -> None:
    import numpy as np

    from emcl.metrics.bootstrap import interval_of
    from emcl.metrics.caption_metrics import bleu

    words = ["a", "man", "dog", "woman", "runs", "cooks", "in", "the", "park", "kitchen", "slowly"]
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(words, rng.integers(4, 9)))

    references = {str(video): [sentence() for _ in range(5)] for video in range(60)}
    hypotheses = {key: texts[0] if int(key) % 3 else sentence() for key, texts in references.items()}
    scores = caption_metrics(hypotheses, references, tokenizer="given")
    total = np.array(scores.counts, np.float64).sum(0)
    for n in (1, 2, 3, 4):
        assert bleu(total, n) == pytest.approx(scores.metrics[f"BLEU-{n}"], rel=1e-9)
    low, high = interval_of(scores.counts, lambda counts: bleu(counts, 4))
    assert low < scores.metrics["BLEU-4"] < high and high - low > 0.05
