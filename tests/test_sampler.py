"""Global batch i is a pure function of (seed, i), whoever reads it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from emcl.data.mixture import MixtureSampler
from emcl.data.sampler import Draw, RankBatchSampler, ShardSampler
from emcl.errors import UserError

CLIPS = ShardSampler(lengths=(10, 7, 13), texts=None, batch_size=6, buffer=8, seed=3)
CAPTIONS = replace(CLIPS, texts=tuple(1 + row % 5 for row in range(30)))
QUESTIONS = replace(CLIPS, texts=tuple(row % 5 for row in range(30)), kind="question")


def read(
    sampler: ShardSampler, world_size: int, accumulation: int = 1, start: int = 0, stop: int = 12
) -> list[list[Draw]]:
    """What the ranks read together, put in order again."""
    per_rank = [
        list(
            RankBatchSampler(
                sampler, rank=rank, world_size=world_size, accumulation=accumulation, start=start, stop=stop
            )
        )
        for rank in range(world_size)
    ]
    steps = []
    for step in range(stop - start):
        batch: list[Draw] = []
        for micro in range(accumulation):
            for rank in range(world_size):
                batch += per_rank[rank][step * accumulation + micro]
        steps.append(batch)
    return steps


@pytest.mark.parametrize("sampler", [CLIPS, CAPTIONS, QUESTIONS])
@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (6, 1), (1, 3), (2, 3)])
def test_the_same_batches_for_any_number_of_ranks(sampler: ShardSampler, world_size: int, accumulation: int) -> None:
    assert read(sampler, world_size, accumulation) == read(sampler, 1)


@pytest.mark.parametrize("sampler", [CLIPS, CAPTIONS, QUESTIONS])
def test_starting_in_the_middle_gives_the_rest(sampler: ShardSampler) -> None:
    assert read(sampler, 2, start=7) == read(sampler, 2)[7:]


@pytest.mark.parametrize("sampler", [CLIPS, CAPTIONS, QUESTIONS])
def test_an_epoch_takes_no_pair_twice_and_another_epoch_another_order(sampler: ShardSampler) -> None:
    per_epoch = sampler.steps_per_epoch
    first = [(draw.row, draw.caption, draw.question) for step in range(per_epoch) for draw in sampler.batch(step)]
    second = [
        (draw.row, draw.caption, draw.question)
        for step in range(per_epoch, 2 * per_epoch)
        for draw in sampler.batch(step)
    ]
    assert len(set(first)) == len(first) == per_epoch * sampler.batch_size
    assert first != second


def test_the_incomplete_last_batch_of_an_epoch_is_dropped() -> None:
    sampler = ShardSampler(lengths=(4, 3), texts=(1, 2, 3, 1, 1, 1, 1), batch_size=4, buffer=100, seed=0)
    assert (sampler.size, sampler.steps_per_epoch) == (10, 2)
    epochs = [[(d.row, d.caption) for step in (2 * n, 2 * n + 1) for d in sampler.batch(step)] for n in range(2)]
    assert all(len(set(pairs)) == 8 for pairs in epochs)


def test_another_seed_gives_another_order() -> None:
    assert CLIPS.batch(0) != replace(CLIPS, seed=4).batch(0)


def test_captions_of_one_video_rarely_meet_in_a_batch() -> None:
    sampler = ShardSampler(lengths=(100, 100), texts=(20,) * 200, batch_size=50, buffer=50, seed=0)
    distinct = [len({draw.row for draw in sampler.batch(step)}) for step in range(sampler.steps_per_epoch)]
    assert sum(distinct) >= 0.97 * 50 * len(distinct)  # 44.3 of 50 if they were drawn from all pairs alike


def test_a_batch_size_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(UserError, match="batch_size=6 is not divisible by 4 ranks .* take 8"):
        RankBatchSampler(CLIPS, rank=0, world_size=4, accumulation=1, start=0, stop=1)


def test_shards_are_drawn_at_random_and_read_in_sequence() -> None:
    sampler = ShardSampler(lengths=(6,) * 8, texts=None, batch_size=6, buffer=1, seed=0)
    epochs = [
        [draw.row for step in range(8 * epoch, 8 * epoch + 8) for draw in sampler.batch(step)] for epoch in range(2)
    ]
    drawn = [list(dict.fromkeys(row // 6 for row in rows)) for rows in epochs]
    assert drawn[0] != list(range(8))
    assert drawn[0] != drawn[1]
    for rows in epochs:
        assert sum(after == before + 1 for before, after in itertools.pairwise(rows)) >= 8 * 5


def test_each_question_is_a_sample_and_videos_without_any_are_none() -> None:
    draws = [draw for step in range(QUESTIONS.steps_per_epoch) for draw in QUESTIONS.batch(step)]
    assert QUESTIONS.size == 60 == len({(draw.row, draw.question) for draw in draws})
    assert all(draw.caption is None and draw.row % 5 > (draw.question or 0) for draw in draws)
    both = MixtureSampler(samplers=(replace(QUESTIONS, batch_size=1),) * 2, counts=(2, 2), seed=0)
    assert all(draw.caption is None and draw.question is not None for draw in both.batch(0))
