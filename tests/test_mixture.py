"""Several sets in one order: by weight, deterministic, each gone through in its own epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from emcl.config import resolve
from emcl.data import mixture
from emcl.data.data_settings import DataConfig
from emcl.data.mixture import open_training, shares, training_patterns
from emcl.errors import UserError


def mixed(shards: Path, batch_size: int = 8, **more: object) -> DataConfig:
    first, second = f"{shards}/train-{{000000..000001}}.tar", f"{shards}/val-000000.tar"
    return DataConfig(mixture={first: 3, second: 1}, batch_size=batch_size, shuffle_buffer=8, **more)  # type: ignore[arg-type]


def test_every_batch_holds_each_sets_share_and_each_set_goes_through_its_own_epochs(sample_shards: Path) -> None:
    shards, sampler = open_training(mixed(sample_shards), seed=0)
    assert len(shards) == 24 + 8
    assert sampler.steps_per_epoch == 4
    drawn: Counter[int] = Counter()
    for step in range(8):
        rows = [draw.row for draw in sampler.batch(step)]
        assert sum(row >= 24 for row in rows) == 2
        drawn.update(rows)
    # 48 of the first set are two of its epochs, 16 of the second two of its own
    assert set(drawn.values()) == {2} and len(drawn) == 32


def test_a_batch_is_a_function_of_seed_and_step_alone(sample_shards: Path) -> None:
    _, sampler = open_training(mixed(sample_shards), seed=0)
    _, again = open_training(mixed(sample_shards), seed=0)
    _, other = open_training(mixed(sample_shards), seed=1)
    assert sampler.batch(5) == again.batch(5)
    assert sampler.batch(5) != other.batch(5)
    assert [draw.row >= 24 for draw in sampler.batch(0)] != sorted(draw.row >= 24 for draw in sampler.batch(0))


def test_caption_pairs_of_several_sets_name_their_own_captions(sample_shards: Path) -> None:
    shards, sampler = open_training(mixed(sample_shards, pairs="caption"), seed=0)
    for step in range(6):
        for draw in sampler.batch(step):
            assert draw.caption is not None and draw.caption < len(shards.rows[draw.row].sample.captions)


def test_shares_are_whole_and_add_up() -> None:
    assert shares([3, 1], 128) == (96, 32)
    assert shares([1, 1, 1], 128) == (43, 43, 42)
    with pytest.raises(UserError, match="without a sample in 8"):
        shares([100, 1], 8)


def test_a_name_of_configs_stands_for_its_training_shards() -> None:
    config = resolve(["retrieval"], overrides=["data.mixture={sample: 3, other.tar: 1}"])
    assert training_patterns(config.data) == {"shards/sample/train-{000000..000003}.tar": 3, "other.tar": 1}


def test_a_set_that_stands_twice_under_two_names_is_refused() -> None:
    config = resolve(["retrieval"], overrides=["data.mixture={sample: 3, shards/sample/train-{000000..000003}.tar: 1}"])
    with pytest.raises(UserError, match="which stands there already"):
        training_patterns(config.data)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(UserError, match="above 0"):
        resolve(["retrieval"], overrides=["data.mixture={sample: 0}"])


def test_shards_that_are_validated_on_are_not_trained_on(sample_shards: Path) -> None:
    train = f"{sample_shards}/train-*.tar"
    whole = open_training(DataConfig(train=train, batch_size=4), 0)[0]
    held = open_training(DataConfig(train=train, val=f"{sample_shards}/train-000000.tar", batch_size=4), 0)[0]
    assert [path.name for path in whole.paths] == ["train-000000.tar", "train-000001.tar"]
    assert [path.name for path in held.paths] == ["train-000001.tar"] and len(held) == 12
    assert len(open_training(DataConfig(train=train, val=train, batch_size=4), 0)[0]) == 24  # nothing would be left


def test_a_set_without_questions_is_named_where_questions_are_samples(sample_shards: Path) -> None:
    data = DataConfig(train=f"{sample_shards}/train-*.tar", pairs="question", batch_size=4)
    shards, sampler = open_training(data, 0)
    assert sampler.batch(0)[0].question is not None
    for row in shards.rows:
        row.sample.qa.clear()
    with pytest.raises(UserError, match=r"no sample in .*sample has a question; take data\.pairs=caption or clip"):
        mixture._sampler(shards, range(2), data, 0, alone=True)
