"""A sample is checked where it is read, and a batch is what the model takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from emcl.data.batch import Batch, VideoFrames, each_tensor
from emcl.data.samples import Sample
from emcl.data.shards import ShardSet
from emcl.errors import UserError
from emcl.prepare.table import read_table
from emcl.prepare.writer import write_shard

WHOLE = {
    "id": "a", "source": "set", "split": "train", "captions": ["a dog"], "start": 1, "end": 2.5,
    "qa": [{"question": "who?", "answer": "dog", "type": "who"}],
}  # fmt: skip


def test_what_is_written_is_read_again() -> None:
    sample = Sample.from_json(json.dumps(WHOLE).encode(), "x")
    assert Sample.from_json(sample.to_json(), "x") == sample
    assert (sample.start, sample.captions, dict(sample.qa[0])["type"]) == (1.0, ["a dog"], "who")
    assert Sample.from_json(b'{"id": "a", "of a later version": [1]}', "x") == Sample(id="a")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("captions", "a dog runs", "captions: Input should be a valid array"),
        ("captions", None, "captions: Input should be a valid array"),
        ("captions", ["a dog", 7], "captions.1: Input should be a valid string"),
        ("captions", {"0": "a dog"}, "captions: Input should be a valid array"),
        ("qa", [{"question": "how many?", "answer": 3}], "qa.0.answer: Input should be a valid string"),
        ("qa", [{"question": "who?"}], "qa.0.answer: Field required"),
        ("qa", [["who?", "dog"]], "qa.0: Input should be an object"),
        ("id", 7, "id: Input should be a valid string"),
        ("id", "", "id: String should have at least 1 character"),
        ("source", None, "source: Input should be a valid string"),
        ("start", "1", "start: Input should be a valid number"),
        ("start", True, "start: Input should be a valid number"),
        ("start", -1, "start: Input should be greater than or equal to 0"),
        ("end", float("nan"), "end: Input should be a finite number"),
        ("end", float("inf"), "end: Input should be a finite number"),
        ("end", 1.0, "end=1.0 is not after start=1.0"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(field: str, value: Any, says: str, tmp_path: Path) -> None:
    text = json.dumps({**WHOLE, field: value}).encode()
    with pytest.raises(UserError) as caught:
        Sample.from_json(text, "train.tar:a.json")
    assert str(caught.value) == f"train.tar:a.json: not a sample's JSON ({says}); write shards with `emcl prepare`"
    with pytest.raises(UserError, match="cannot be written"):
        Sample(**{**WHOLE, field: value}).to_json()  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"", b"[]", b"nothing", b'{"id": "a"', b'{"captions": []}', b"\xff\xfe", b'"a"'])
def test_what_is_no_sample_at_all_is_refused_in_one_line(text: bytes) -> None:
    with pytest.raises(UserError, match=r"^here: not a sample's JSON \(.*\); write shards") as caught:
        Sample.from_json(text, "here")
    assert "\n" not in str(caught.value)


def test_a_shard_with_one_is_damaged_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sample, "to_json", lambda self: json.dumps({"id": self.id, "captions": self.captions}).encode())
    odd = Sample(id="odd", captions="a dog")  # type: ignore[arg-type]
    samples = [(one, "mp4", b"video") for one in (Sample(id="whole"), odd)]
    write_shard(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match=r"odd\.json: not a sample's JSON \(captions"):
        ShardSet([tmp_path / "a.tar"])
    shards = ShardSet([tmp_path / "a.tar"], max_bad_fraction=0.5)
    assert [row.sample.id for row in shards.rows] == ["whole"] and len(shards.damaged) == 1


@pytest.mark.parametrize(
    "pair", [["who?"], ["who?", "dog", "cat"], "who?", {"question": "who?"}, ["how many?", 3], None]
)
def test_a_table_whose_questions_are_no_pairs_is_refused_by_line(pair: Any, tmp_path: Path) -> None:
    table = tmp_path / "clips.json"
    table.write_text(json.dumps([{"file": "a.mp4", "caption": "x", "qa": [["who?", "dog"], pair]}]))
    with pytest.raises(UserError, match=r"clips\.json, line 1: qa wants \[question, answer\], two texts, not "):
        read_table(table)


class Pair(NamedTuple):
    one: Tensor
    name: str


@dataclass(frozen=True)
class Part:
    """What a task's collator may make."""

    ids: Tensor
    more: dict[str, list[Tensor]]
    pair: Pair
    rest: tuple[Tensor, int] | None = None


def a_batch() -> Batch:
    inputs = Part(torch.ones(2), {"x": [torch.ones(1)]}, Pair(torch.ones(1), "a"), (torch.ones(1), 3))
    mask = torch.ones(1, 2, dtype=torch.bool)
    videos = VideoFrames(frames=torch.zeros(2, 4, 4, 3), slots=torch.arange(2), mask_BT=mask)
    plan = {"operations": [], "numbers": torch.ones(3)}
    return Batch(
        ids=["a"], rows=[0], videos=videos, video_B=torch.ones(1), tasks={"t": inputs, "u": None}, augmentation=plan
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    each_tensor(batch, lambda tensor: (seen.append(tensor), tensor)[1])
    return seen


@pytest.mark.parametrize(
    "change", [lambda batch: batch.to(torch.device("meta")), Batch.pin_memory], ids=["to a device", "pinned"]
)
def test_every_tensor_of_a_batch_goes_along(change: Callable[[Batch], Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    batch = a_batch()
    moved = change(batch)
    assert len(tensors_of(batch)) == len(tensors_of(moved)) == 9
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(batch)} == {"cpu"}
    assert isinstance(moved.tasks["t"].pair, Pair) and moved.tasks["t"].rest[1] == 3 and moved.tasks["u"] is None
    assert (moved.ids, moved.frame_count) == (["a"], 2)
