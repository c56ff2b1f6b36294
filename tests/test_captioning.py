"""The caption decoder: its vocabulary, its loss, and generation that batching does not change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import TINY
from emcl.config import Config, resolve
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.data.vocabulary import END, PADDING, START, UsedTokens
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.model.backbone import Encoded, build_backbone
from emcl.model.model_settings import Generation
from emcl.registry import task_class

CAPTIONS = ["A red circle moves left.", "a man's dog runs, then sits", "two squares — one small"]
SAMPLES = [Sample(id=str(number), captions=CAPTIONS[: number + 1]) for number in range(3)]


def settings(*more: str) -> Config:
    few = ["data.image_size=32", "data.frames=3", "tasks.captioning.captions_per_video=1"]
    return resolve(["captioning"], overrides=[f"model.name={TINY}", *few, *more])


def task_of(config: Config):  # type: ignore[no-untyped-def]
    kind = task_class("captioning")
    learned = kind.learn_settings(config.tasks["captioning"], config, SAMPLES)
    config = dataclasses.replace(config, tasks={"captioning": learned})
    torch.manual_seed(0)
    return kind(learned, config, build_backbone(config)).eval(), config


def encoded(width: int, *lengths: int) -> Encoded:
    mask = torch.zeros(len(lengths), 3, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return Encoded(torch.randn(len(lengths), 3, width, generator=torch.Generator().manual_seed(1)), mask)


def test_the_vocabulary_is_what_the_captions_use() -> None:
    vocabulary = UsedTokens.open(None, UsedTokens.of_captions(None, CAPTIONS))
    assert vocabulary.size < 40
    for caption in CAPTIONS:
        ids = vocabulary.encode(caption)
        assert min(ids) > END
        decoded = vocabulary.decode([START, *ids, END, ids[0], PADDING])
        assert vocabulary.encode(decoded) == ids
    assert vocabulary.decode([*vocabulary.encode("a red dog"), END]) == "a red dog"
    assert vocabulary.encode("zebra") == []


def test_captions_are_drawn_from_all_references() -> None:
    task, config = task_of(settings("tasks.captioning.captions_per_video=2"))
    collate = type(task).collator(task.settings, config, None, training=True)
    seen = set()
    for seed in range(40):
        inputs = collate(SAMPLES, [Draw(row, None, seed) for row in range(3)])
        assert inputs.video_N.tolist() == [0, 1, 1, 2, 2]
        seen |= {task.vocabulary.decode(row) for row in inputs.ids_NL.tolist()}
    assert len(seen) == 3
    inputs = collate(SAMPLES[2:], [Draw(2, 1, 7)])
    assert task.vocabulary.decode(inputs.ids_NL[0].tolist()).startswith("a man")  # a pair's own caption comes first


def test_the_loss_is_the_mean_over_all_tokens_and_padding_is_none() -> None:
    task, config = task_of(settings("tasks.captioning.label_smoothing=0", "tasks.captioning.dropout=0"))
    collate = type(task).collator(task.settings, config, None, training=True)
    videos = encoded(task.decoder.frames[0].normalized_shape[0], 3, 2, 1)
    inputs = collate(SAMPLES, [Draw(row, row, 0) for row in range(3)])
    loss = float(task.losses(None, videos, inputs, ALONE)["cross_entropy"].detach())
    total, count = 0.0, 0
    for row, sample in enumerate(SAMPLES):
        ids = task.vocabulary.encode(sample.captions[row])
        one = Encoded(videos.frames_BTD[row : row + 1], videos.video_mask_BT[row : row + 1])
        frames = task.compacted(one, ALONE)
        with torch.no_grad():
            every = torch.arange(len(ids) + 1)
            logits = task.decoder(torch.tensor([[START, *ids]]), frames, one.video_mask_BT, every)
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor([*ids, END]), reduction="sum"))
        count += len(ids) + 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_captions_adds_exactly_nothing() -> None:
    task, config = task_of(settings())
    collate = type(task).collator(task.settings, config, None, training=True)
    inputs = collate([Sample(id="x")] * 2, [Draw(0, None, 0)] * 2)
    videos = encoded(task.decoder.frames[0].normalized_shape[0], 3, 2)
    loss = task.losses(None, videos, inputs, ALONE)["cross_entropy"]
    assert float(loss) == 0
    loss.backward()
    assert all(float(weight.grad.abs().sum()) == 0 for weight in task.parameters() if weight.grad is not None)


@pytest.mark.parametrize(
    "how",
    [
        Generation(max_new_tokens=10),
        Generation(num_beams=1, max_new_tokens=10),
        Generation(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=2, max_new_tokens=10),
    ],
)
def test_batching_padding_and_the_cache_change_no_caption(how: Generation) -> None:
    task, _ = task_of(settings())
    with torch.no_grad():  # logits far apart: no tie that rounding could decide
        for parameter in task.decoder.parameters():
            parameter.mul_(3)
    videos = encoded(task.decoder.frames[0].normalized_shape[0], 3, 1, 2, 3)
    together = task.decoder.generate(videos.frames_BTD, videos.video_mask_BT, how)
    slowly = task.decoder.generate(videos.frames_BTD, videos.video_mask_BT, dataclasses.replace(how, use_cache=False))
    assert torch.equal(together, slowly)
    for row in range(4):
        length = int(videos.video_mask_BT[row].sum())
        alone = task.decoder.generate(
            videos.frames_BTD[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool), how
        )
        assert task.vocabulary.decode(alone[0].tolist()) == task.vocabulary.decode(together[row].tolist())
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_sampling_draws_different_captions() -> None:
    task, _ = task_of(settings())
    videos = encoded(task.decoder.frames[0].normalized_shape[0], 3)
    torch.manual_seed(0)
    how = Generation(num_beams=1, do_sample=True, max_new_tokens=8)
    assert (
        len({tuple(task.decoder.generate(videos.frames_BTD, videos.video_mask_BT, how)[0].tolist()) for _ in range(5)})
        > 1
    )


def test_a_local_gpt2_and_its_tokenizer_are_started_from(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<|endoftext|>", *["a", "red", "circle", "moves", "left", "the", "dog", "runs"]]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=49, n_embd=32, n_layer=2, n_head=2))
    gpt2.save_pretrained(tmp_path)
    task, _ = task_of(settings(f"tasks.captioning.pretrained={tmp_path}"))
    torch.testing.assert_close(task.decoder.decoder.transformer.wte.weight, gpt2.transformer.wte.weight)
    assert task.vocabulary.decode(task.vocabulary.encode("the red dog runs")) == "the red dog runs"
    assert len(task.generate(encoded(task.decoder.frames[0].normalized_shape[0], 3, 2))) == 2
    with pytest.raises(UserError, match=r"max_tokens=49 is not a whole number of tokens from 2 to 48, the pos"):
        task_of(settings(f"tasks.captioning.pretrained={tmp_path}", "tasks.captioning.max_tokens=49"))


@pytest.mark.parametrize("key", ["pretrained", "tokenizer"])
def test_a_folder_that_is_not_there_is_named(key: str) -> None:
    with pytest.raises(UserError, match="no/such"):
        task_of(settings(f"tasks.captioning.{key}=no/such"))
