"""Question answering: metrics by hand, the vocabulary, questions in batches, and a head that sees what it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from emcl.tasks.msrvtt_qa_questions import BEYOND, UNKNOWN

from conftest import TINY
from emcl.config import Config, resolve
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.metrics.answer_metrics import answer_metrics, question_type
from emcl.model.backbone import Encoded, build_backbone
from emcl.model.emcl_layer import EMCLLayer
from emcl.registry import task_class

SAMPLES = [
    Sample(id="a", qa=[{"question": "what moves?", "answer": "Circle"}, {"question": "who?", "answer": "nobody"}]),
    Sample(id="b"),
    Sample(id="c", qa=[{"question": "what is red?", "answer": "circle "}, {"question": "how many?", "answer": "two"}]),
]


ONLY = torch.tensor([0])
"""The place of the only one."""


def settings(*more: str) -> Config:
    return resolve(
        ["msrvtt_qa"], overrides=[f"model.name={TINY}", "data.image_size=32", "data.frames=3", "emcl.bases=4", *more]
    )


def task_of(config: Config):  # type: ignore[no-untyped-def]
    kind = task_class("msrvtt_qa")
    learned = kind.learn_settings(config.tasks["msrvtt_qa"], config, SAMPLES)
    config = dataclasses.replace(config, tasks={"msrvtt_qa": learned})
    torch.manual_seed(0)
    backbone = build_backbone(config)
    return kind(learned, config, backbone).eval(), config, backbone


def test_metrics_by_hand() -> None:
    top = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 6, 7, 8, 9], [2, 1, 0, 3, 4], [0, 1, 2, 3, 4]])
    right = np.array([0, 0, -1, 2, 9])
    questions = ["What is it?", "who runs", "where is it", "is it red?", "what else"]
    scores = answer_metrics(top, right, questions, most_frequent=0)
    assert scores == pytest.approx(
        {
            "accuracy": 40, "accuracy_in_vocabulary": 50, "top_5": 60, "most_frequent": 40, "answers_in_vocabulary": 80,
            "type/what": 50, "type/who": 0, "type/where": 0, "type/other": 100,
        }
    )  # fmt: skip


def test_an_unknown_answer_is_wrong_even_where_the_model_gives_the_same_number() -> None:
    assert answer_metrics(np.array([[-1]]), np.array([-1]), ["what"], most_frequent=0)["accuracy"] == 0


def test_question_types() -> None:
    asked = ("What's", "what is", "WHO", "", "whose", "when")
    assert [question_type(question) for question in asked] == ["other", "what", "who", "other", "other", "when"]


def test_the_vocabulary_is_the_most_frequent_training_answers() -> None:
    task, _, _ = task_of(settings("tasks.msrvtt_qa.answers_kept=2"))
    assert task.settings.answers == ["circle", "nobody"]
    with pytest.raises(UserError, match="none of the .* training samples has a question"):
        task_class("msrvtt_qa").learn_settings(settings().tasks["msrvtt_qa"], settings(), [Sample(id="x")])


def test_questions_know_their_videos_and_answers() -> None:
    task, config, _ = task_of(settings("tasks.msrvtt_qa.questions_per_video=5", "tasks.msrvtt_qa.answers_kept=2"))
    draws = [Draw(row, None, row) for row in range(3)]
    inputs = type(task).collator(task.settings, config, None, training=True)(SAMPLES, draws)
    assert inputs.video_N.tolist() == [0, 0, 2, 2]
    assert sorted(inputs.answer_N.tolist()) == [-1, 0, 0, 1]
    assert inputs.present_B.tolist() == [True, False, True]
    assert inputs.first_B.tolist() == [0, 0, 2]
    inputs = type(task).collator(task.settings, config, None, training=False)(SAMPLES, draws)
    assert inputs.texts == ["what moves?", "who?", "what is red?", "how many?"]


def test_a_batch_without_questions_adds_exactly_nothing() -> None:
    task, config, backbone = task_of(settings())
    collate = type(task).collator(task.settings, config, None, training=True)
    inputs = collate([Sample(id="x")] * 2, [Draw(0, None, 0)] * 2)
    encoded = Encoded(torch.randn(2, 3, backbone.embed_dim), torch.ones(2, 3, dtype=torch.bool))
    losses = task.losses(backbone, encoded, inputs, ALONE)
    assert all(float(loss.detach()) == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(float(weight.grad.abs().sum()) == 0 for weight in task.parameters() if weight.grad is not None)


def test_padding_of_questions_and_frames_changes_no_answer() -> None:
    task, _, backbone = task_of(settings())
    words = backbone.encode_tokens(torch.nn.functional.pad(torch.randint(1, 400, (1, 6)), (0, 18)))
    frames = torch.randn(1, 2, backbone.embed_dim)
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 4), value=7.0)
    fewer = tuple(tensor[:, :6] for tensor in words)
    with torch.no_grad():
        short = task.head_of_all(Encoded(frames, torch.ones(1, 2, dtype=torch.bool)), *fewer, ONLY, ONLY)[2]
        long = task.head_of_all(
            Encoded(padded, torch.tensor([[True] * 2 + [False] * 4])),
            *words, ONLY, ONLY,
        )[2]  # fmt: skip
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_a_question_only_model_does_not_see_the_video() -> None:
    for use_video, same in ((True, False), (False, True)):
        task, _, backbone = task_of(settings(f"tasks.msrvtt_qa.use_video={use_video}"))
        tokens = backbone.encode_tokens(torch.randint(1, 400, (1, 24)))
        mask = torch.ones(1, 3, dtype=torch.bool)
        with torch.no_grad():
            one, two = (
                task.head_of_all(Encoded(torch.randn(1, 3, backbone.embed_dim), mask), *tokens, ONLY, ONLY)[2]
                for _ in range(2)
            )
        assert torch.equal(one, two) is same


def test_each_video_of_several_is_asked_the_same_question() -> None:
    task, _, backbone = task_of(settings())
    frames, mask = torch.randn(3, 3, backbone.embed_dim), torch.ones(3, 3, dtype=torch.bool)
    with torch.no_grad():
        together = task.predict(backbone, Encoded(frames, mask), "what moves?", top=9)
        alone = [
            task.predict(backbone, Encoded(frames[n : n + 1], mask[:1]), "what moves?", top=9)[0] for n in range(3)
        ]
    assert together[0] != together[1]
    for said, wanted in zip(together, alone, strict=True):
        assert [one.text for one in said] == [one.text for one in wanted] and len(said) == len(task.settings.answers)
        assert [one.probability for one in said] == pytest.approx([one.probability for one in wanted], abs=1e-5)
        assert sum(one.probability for one in said) == pytest.approx(1, abs=1e-5)


def test_the_published_vocabulary_counts_answers_that_cannot_be_chosen() -> None:
    """1,500 answers of which 1,000 can be chosen, in small: three, of which one can."""
    task, config, _ = task_of(settings("tasks.msrvtt_qa.answers_kept=1", "tasks.msrvtt_qa.answers_counted=3"))
    assert task.settings.answers == ["circle"]
    assert task.settings.answers_beyond == ["nobody", "two"]
    assert task_of(settings("tasks.msrvtt_qa.answers_kept=1"))[0].settings.answers_beyond is None
    again = type(task).learn_settings(task.settings, config, [Sample(id="x")])  # a run that is scored or goes on
    assert again == task.settings

    inputs = type(task).collator(task.settings, config, None, training=False)(SAMPLES, [Draw(0, None, 0)] * 3)
    assert inputs.answer_N.tolist() == [0, BEYOND, 0, BEYOND]
    top, right = np.zeros((5, 1), np.int64), np.array([0, BEYOND, 0, BEYOND, UNKNOWN])
    metrics = answer_metrics(top, right, ["what?"] * 5, most_frequent=0)
    assert metrics["accuracy"] == metrics["top_5"] == pytest.approx(40)
    assert metrics["accuracy_in_vocabulary"] == pytest.approx(50)
    assert metrics["answers_in_vocabulary"] == pytest.approx(80)

    encoded = Encoded(torch.randn(3, 3, 32), torch.ones(3, 3, dtype=torch.bool))
    backbone = task_of(settings())[2]
    loss = task.losses(backbone, encoded, inputs, ALONE)["cross_entropy"]
    assert float(loss.detach()) == 0  # of one choice, and nothing of the two that are none


def test_a_question_is_a_sample_of_its_own() -> None:
    task, config, _ = task_of(settings("tasks.msrvtt_qa.questions_per_video=5"))
    collate = type(task).collator(task.settings, config, None, training=True)
    inputs = collate(SAMPLES, [Draw(0, None, 0, 1), Draw(1, None, 0), Draw(2, None, 0, 0)])
    assert inputs.texts == [SAMPLES[0].qa[1]["question"], SAMPLES[2].qa[0]["question"]]
    assert inputs.video_N.tolist() == [0, 2] and inputs.present_B.tolist() == [True, False, True]


def test_videos_without_a_question_are_no_rows_of_em() -> None:
    """mu moves as it does on a batch of the others alone."""
    videos, questions = torch.randn(4, 8), torch.randn(4, 8)
    there = torch.tensor([True, False, True, False])
    layers = [EMCLLayer(bases=4, width=8) for _ in range(2)]
    layers[0](videos * there[:, None], questions * there[:, None])
    layers[1](videos[there], questions[there])
    torch.testing.assert_close(layers[0].mu, layers[1].mu)
    assert not torch.equal(layers[0].mu, EMCLLayer(bases=4, width=8).mu)


def test_in_the_published_head_an_answer_does_not_depend_on_its_neighbours_length() -> None:
    """Padding takes part in its softmax, so all questions get as much, also by tokenizers that pad to the longest."""
    task, _, backbone = task_of(settings("tasks.msrvtt_qa.head=reference"))
    ids = torch.randint(1, 400, (1, 6))
    longest = torch.nn.functional.pad(ids, (0, 18), value=backbone.text.padding)
    encoded = Encoded(torch.randn(1, 3, backbone.embed_dim), torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        answers = [task.answers_of(backbone, encoded, tokens, ONLY) for tokens in (ids, longest)]
    torch.testing.assert_close(*answers)
    assert float(task.head.classifier[1].weight.detach().std()) == pytest.approx(0.02, rel=0.05)
