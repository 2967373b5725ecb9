"""Tests of reproducible epochs: augmentation depends on seed, epoch and row, and on nothing that happened before."""

import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from gdino_hf.data.augmentation import default_transform
from gdino_hf.data.coco import read_coco
from gdino_hf.data.collator import GDinoDataCollator
from gdino_hf.data.negatives import PromptSampler
from gdino_hf.data.reproducible_sampling import (
    ReproducibleDataset,
    ReproducibleSampler,
    ReproducibleStream,
    SampleKey,
    row_random,
)

NAMES = ["cat", "dog", "cup", "person", "ball", "bird"]


def make_rows(count=10):
    """Return rows with one box each on images of random colours."""
    colours = np.random.default_rng(0).integers(0, 255, (count, 3))
    return [
        {
            "image": Image.new("RGB", (60, 40), tuple(int(value) for value in colours[index])),
            "image_id": index,
            "boxes": [[5, 5, 25 + index, 30]],
            "names": [NAMES[index % len(NAMES)]],
            "crowd": [False],
        }
        for index in range(count)
    ]


@pytest.fixture
def collator(tiny_processor):
    rows = make_rows()
    transform = default_transform(
        tiny_processor.image_processor.size, colour=0.5, mosaic=0.5, rows=ReproducibleDataset(rows), step=8
    )
    return GDinoDataCollator(tiny_processor, prompt_sampler=PromptSampler(NAMES, (2, 6)), transform=transform, seed=3)


def loader(collator, batch_size=2, workers=0, rows=None):
    rows = ReproducibleDataset(rows or make_rows())
    return DataLoader(
        rows, batch_size, sampler=ReproducibleSampler(len(rows), seed=1), collate_fn=collator, num_workers=workers
    )


def epochs(batches, which=(0, 1)):
    """Return the batches of several epochs."""
    result = []
    for epoch in which:
        batches.sampler.set_epoch(epoch)
        result.append(list(batches))
    return result


def assert_same_batches(first, second):
    for name, value in first.items():
        if name == "labels":
            for one, other in zip(value, second[name], strict=True):
                assert all(torch.equal(one[key], other[key]) for key in one)
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


def test_every_row_is_drawn_once_per_epoch_in_a_new_order():
    sampler = ReproducibleSampler(20, seed=0)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert sorted(key.row for key in first) == sorted(key.row for key in second) == list(range(20))
    assert [key.row for key in first] != [key.row for key in second]
    assert {key.epoch for key in second} == {1}
    assert [key.row for key in ReproducibleSampler(5, shuffle=False)] == list(range(5))
    assert list(ReproducibleSampler(20, seed=1)) != first


def test_weights_are_mean_numbers_of_draws():
    sampler = ReproducibleSampler(3, seed=0, weights=[1.0, 2.5, 0.25])
    counts = Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(set(keys)) == len(sampler) == 4
        counts.update(key.row for key in keys)
    # The weights sum to 3.75, which is rounded to 4 draws per epoch.
    assert [counts[row] / 400 for row in range(3)] == pytest.approx([4 / 3.75, 10 / 3.75, 1 / 3.75], abs=0.1)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_invalid_weights_are_rejected(weights):
    with pytest.raises(ValueError, match="weights"):
        ReproducibleSampler(2, weights=weights)


def test_a_resumed_epoch_continues_with_the_same_batches(collator, tiny_processor):
    unbroken = epochs(loader(collator))
    # A new collator without any history, as in a new process, starts in the middle of the second epoch.
    fresh = GDinoDataCollator(
        tiny_processor, prompt_sampler=collator.prompt_sampler, transform=collator.transform, seed=3
    )
    batches = loader(fresh)
    batches.sampler.set_epoch(1)
    resumed = list(skip_first_batches(batches, 3))
    assert len(resumed) == 2
    for first, second in zip(unbroken[1][3:], resumed, strict=True):
        assert_same_batches(first, second)


def test_epochs_differ(collator):
    first, second = epochs(loader(collator, batch_size=10))
    assert not torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])


@pytest.mark.parametrize("skip", [0, 2])
def test_two_processes_see_the_batches_of_one(collator, skip):
    """Rows, augmentation and prompts are the same, also when the epoch is resumed."""
    one = epochs(loader(collator, batch_size=1), [2])[0]
    for process in range(2):
        single = loader(collator, batch_size=1)
        batches = skip_first_batches(prepare_data_loader(single, num_processes=2, process_index=process), skip)
        # skip_first_batches hides the sampler from the loader's own set_epoch.
        single.sampler.set_epoch(2)
        seen = list(batches)
        assert len(seen) == 5 - skip
        for place, batch in enumerate(seen):
            assert_same_batches(one[2 * (skip + place) + process], batch)


@pytest.mark.slow
def test_worker_processes_change_nothing(collator):
    for first, second in zip(epochs(loader(collator))[1], epochs(loader(collator, workers=2))[1], strict=True):
        assert_same_batches(first, second)


def test_generators_depend_on_seed_and_sample_key():
    row = {"sample_key": SampleKey(0, 4)}
    numbers = {
        row_random({"sample_key": key}, seed).random()
        for key in (SampleKey(0, 4), SampleKey(1, 4), SampleKey(0, 5))
        for seed in (0, 1)
    }
    numbers.add(row_random({"sample_key": SampleKey(0, 4, 1)}, 0).random())
    assert len(numbers) == 7
    assert row_random(row, 0).random() == row_random({"sample_key": (0, 4, 0)}, 0).random()
    assert row_random({}, 0) is None


@pytest.fixture
def damaged(tmp_path):
    """A data set of three images, and a function that deletes the second one or replaces its content."""
    import json

    (tmp_path / "images").mkdir()
    images = [{"id": n, "file_name": f"{n}.png", "width": 20, "height": 10} for n in range(3)]
    for item in images:
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / item["file_name"])
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(content))

    def damage(text):
        path = tmp_path / "images" / "1.png"
        path.unlink() if text is None else path.write_text(text)

    return tmp_path / "train.json", damage


@pytest.mark.parametrize("text", [None, "no picture"])
def test_an_unreadable_image_gives_a_one_line_error_or_is_skipped(damaged, text, caplog):
    path, damage = damaged
    rows = read_coco(path)
    damage(text)
    stopping, skipping = ReproducibleDataset(rows), ReproducibleDataset(rows, on_error="skip")
    assert stopping[SampleKey(0, 0)]["image_id"] == 0
    for item in (SampleKey(0, 1), 1):
        with pytest.raises(ValueError, match=r"1\.png cannot be read .*; repair it") as caught:
            stopping[item]
        assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert [skipping[SampleKey(0, index)]["image_id"] for index in (0, 1, 2, 1)] == [0, 2, 2, 2]
    assert caplog.text.count("1.png") == 1
    assert skipping[SampleKey(0, 1)]["sample_key"] == SampleKey(0, 1)


def test_an_unreadable_image_of_a_stream_gives_an_error_or_is_skipped(damaged, caplog):
    path, damage = damaged
    damage("no picture")
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        list(ReproducibleStream(read_coco(path, streaming=True), buffer=0))
    stream = ReproducibleStream(read_coco(path, streaming=True), buffer=0, on_error="skip")
    stream.set_epoch(4)
    assert [row["sample_key"] for row in stream] == [SampleKey(4, 0), SampleKey(4, 2)]
    assert next(iter(stream))["image"].size == (20, 10)
    shuffled = ReproducibleStream(read_coco(path, streaming=True), seed=1, on_error="skip")
    orders = set()
    for epoch in range(8):
        shuffled.set_epoch(epoch)
        orders.add(tuple(row["image_id"] for row in shuffled))
    assert orders == {(0, 2), (2, 0)}


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="no rows"):
        ReproducibleSampler(0)
    with pytest.raises(ValueError, match="on_error"):
        ReproducibleDataset([], on_error="ignore")


def test_an_epoch_is_filled_up_to_complete_steps():
    for weights, own in ((None, 10), ([0.5] * 10, 5)):
        plain = ReproducibleSampler(10, seed=3, weights=weights)
        filled = ReproducibleSampler(10, seed=3, weights=weights, multiple=8)
        keys = list(filled)
        assert len(keys) == len(filled) == -(-own // 8) * 8
        assert keys[:own] == list(plain)
        # The first rows are drawn again, with other keys and thus other augmentation.
        assert [key.row for key in keys[own:]] == [key.row for key in keys[: len(keys) - own]]
        assert len(set(keys)) == len(keys)
    assert len(list(ReproducibleSampler(3, multiple=8))) == 8
    with pytest.raises(ValueError, match="multiple"):
        ReproducibleSampler(3, multiple=0)


def test_an_endless_stream_continues_with_the_next_epoch(damaged):
    path = damaged[0]
    stream = ReproducibleStream(read_coco(path, streaming=True), seed=1, endless=True)
    single = ReproducibleStream(read_coco(path, streaming=True), seed=1)
    expected = []
    for epoch in range(3):
        single.set_epoch(epoch)
        expected += [row["sample_key"] for row in single]
    assert [row["sample_key"] for row in itertools.islice(stream, len(expected))] == expected
    assert {key.epoch for key in expected} == {0, 1, 2}
    for file in (path.parent / "images").iterdir():
        file.write_text("no picture")
    with pytest.raises(ValueError, match="None of the 3 images"):
        next(iter(ReproducibleStream(read_coco(path, streaming=True), on_error="skip", endless=True)))
