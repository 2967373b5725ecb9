"""Running the page's models: one at a time, in bounded passes, and refusals before a model runs."""

import concurrent.futures

import pytest
import torch
from gdino_demo import engine as module
from gdino_demo.engine import Models
from gdino_demo.queries import Query, read_caption, read_query
from gdino_demo.safety import Picture, Refused, read_picture

from gdino_hf import Detector, Vocabulary


@pytest.fixture(scope="module")
def models(tiny_folder):
    return Models({"tiny": Detector(tiny_folder)})


@pytest.fixture(scope="module")
def photograph(example_folder):
    return read_picture(example_folder / "cat.jpg", "cat.jpg")


def logits(outputs):
    return outputs.rows[0][0][0]


def test_many_threads_get_the_results_of_one(models, photograph):
    query = read_query("cat")
    alone = models.run("tiny", photograph, query)
    forwards = models.forwards
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: models.run("tiny", photograph, query), range(8)))
    assert models.forwards == forwards + 8
    assert all(torch.equal(logits(answer), logits(alone)) for answer in answers)


@pytest.mark.parametrize(
    ("name", "query", "sentence"),
    [
        ("other", read_query("cat"), "no model of this name"),
        ("tiny", read_query("cat " * 100), "shorten it"),
        ("tiny", read_caption("a cat and " * 300), "shorten it"),
        ("tiny", read_caption("安全帽"), "knows no word of the caption's phrases"),
    ],
)
def test_unknown_models_and_unusable_texts_are_refused(models, photograph, name, query, sentence):
    forwards = models.forwards
    with pytest.raises(Refused, match=sentence):
        models.run(name, photograph, query)
    with pytest.raises(Refused, match=sentence):
        models.check(name, query)
    assert models.forwards == forwards


def test_passes_are_counted_before_a_model_runs(models, photograph, monkeypatch):
    one_per_prompt = Vocabulary([f"thing {number}" for number in range(5)], labels_per_prompt=1)
    monkeypatch.setattr(module, "MOST_PASSES", 5)
    assert len(models.run("tiny", photograph, Query(one_per_prompt)).rows[0]) == 5
    forwards = models.forwards
    with pytest.raises(Refused, match="one request takes 5, choose larger tiles or fewer labels"):
        models.run("tiny", photograph, Query(one_per_prompt, tiles=150))
    with pytest.raises(Refused, match="at least 32"):
        models.run("tiny", photograph, Query(one_per_prompt, tiles=31))
    assert models.forwards == forwards


def test_tiles_cover_larger_pictures_alone(models, photograph):
    width, height = photograph.image.size
    assert models.run("tiny", photograph, read_query("cat", tiles=max(width, height))).tiles == ()
    outputs = models.run("tiny", photograph, read_query("cat", tiles=150))
    assert len(outputs.rows) == 1 + len(outputs.tiles) > 2
    assert max(tile[2] for tile in outputs.tiles) == width
    assert max(tile[3] for tile in outputs.tiles) == height


def test_stored_outputs_do_not_grow_with_the_longest_prompt(models, photograph):
    outputs = models.run("tiny", photograph, read_query("cat"))
    (own,) = outputs.rows[0]
    assert own[0].shape[1] == len(outputs.asked.chunks[0].input_ids)
    assert own[0].untyped_storage().nbytes() == own[0].numel() * 4


def test_a_video_frame_without_a_file_gives_the_same_boxes(models, photograph):
    frame, query = Picture(photograph.image, b"", "frame"), read_query("cat")
    assert torch.equal(logits(models.run("tiny", frame, query)), logits(models.run("tiny", photograph, query)))
