"""The plan: shards of equal size in the order of the sources, the same however often planning was stopped."""

from itertools import chain

import pytest

from gdino_hf.labeling import shard_plan
from gdino_hf.labeling.label_store import LabelStore
from gdino_hf.labeling.shard_plan import PlanReader, write_plan
from gdino_hf.labeling.sources import Sources
from label_command import digests


@pytest.fixture
def sources(tmp_path):
    """Twenty-three files that only look like pictures."""
    (tmp_path / "p").mkdir()
    for number in range(23):
        (tmp_path / "p" / f"{number:02d}.png").touch()
    return Sources([str(tmp_path / "p")])


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(shard_plan, "_PART", 10)


def shards(store, size):
    reader = PlanReader(store, size)
    reader.refresh()
    return [[item.source[-6:-4] for item in reader.items(number)] for number in range(reader.shards)], reader


def test_shards_hold_every_picture_once_in_order(sources, tmp_path):
    store = LabelStore(tmp_path / "out")
    write_plan(store, sources, 2 * 5)
    found, reader = shards(store, 5)
    assert [len(shard) for shard in found] == [5, 5, 5, 5, 3]
    assert [*chain(*found)] == [f"{number:02d}" for number in range(23)]
    assert (reader.pictures, reader.ended) == (23, True)
    assert [reader.size(number) for number in range(5)] == [5, 5, 5, 5, 3]
    assert store.names("plan") == ["000000-10.jsonl", "000001-10.jsonl", "000002-3-end.jsonl"]


def test_planning_that_was_stopped_anywhere_gives_the_same_plan(sources, tmp_path):
    write_plan(LabelStore(tmp_path / "whole"), sources, 10)
    store = LabelStore(tmp_path / "out")
    for stop_after in (1, 1, 2, 5):
        turns = iter([False] * stop_after + [True])
        write_plan(store, sources, 10, lambda turns=turns: next(turns))
    assert digests(store.folder) == digests(tmp_path / "whole")


def test_pictures_that_vanish_between_two_plannings_shift_no_other(sources, tmp_path):
    store = LabelStore(tmp_path / "out")
    turns = iter([False, True])
    write_plan(store, sources, 10, lambda: next(turns))
    (tmp_path / "p" / "03.png").unlink()
    (tmp_path / "p" / "15.png").unlink()
    write_plan(store, sources, 10)
    found, _ = shards(store, 5)
    assert [*chain(*found)] == [f"{number:02d}" for number in range(23) if number != 15]


def test_an_unfinished_plan_has_whole_shards_alone(sources, tmp_path):
    store = LabelStore(tmp_path / "out")
    turns = iter([False, True])
    write_plan(store, sources, 10, lambda: next(turns))
    found, reader = shards(store, 5)
    assert [len(shard) for shard in found] == [5, 5]
    assert not reader.ended
    write_plan(store, sources, 10)
    reader.refresh()
    assert (reader.shards, reader.ended) == (5, True)


def test_no_picture_is_an_empty_plan(tmp_path):
    (tmp_path / "p").mkdir()
    store = LabelStore(tmp_path / "out")
    write_plan(store, Sources([str(tmp_path / "p")]), 10)
    found, reader = shards(store, 5)
    assert (found, reader.pictures, reader.ended) == ([], 0, True)
