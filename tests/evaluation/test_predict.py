"""Tests of prediction over a data set: several prompts, batches, streams, broken images, storing and resuming."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import GDinoProcessor
from gdino_hf.evaluation.predict import predict
from gdino_hf.evaluation.prediction_file import PredictionFile, read_predictions

LABELS = ["cat", "dog", "red car", "traffic light", "remote control"]
# Tolerance of boxes in pixels of a 200-pixel image, for float32 sums in another order.
PIXELS = 0.01
# Prompts that share a forward pass are padded to the longest, so sums have another order.
SCORES = 1e-5


def picture(seed, size=(200, 100)):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def rows(tmp_path):
    """Rows of four images on disk."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        picture(number, (200, 100) if number % 2 else (100, 160)).save(path)
    return [{"image": str(path), "image_id": 7 + number} for number, path in enumerate(paths)]


def same(first, second):
    """Assert that two lists of predictions agree up to rounding."""
    assert [item["image_id"] for item in first] == [item["image_id"] for item in second]
    for one, other in zip(first, second, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=PIXELS)
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=0, atol=SCORES)


def test_the_best_pairs_of_query_and_label_are_kept(tiny_model, tiny_processor, rows):
    with torch.no_grad():
        inputs = tiny_processor(images=[picture(1)], text=[LABELS])
        outputs = tiny_model(**inputs)
        (expected,) = tiny_processor.post_process_grounded_object_detection(
            outputs, inputs, threshold=0, text_threshold=0, target_sizes=[(100, 200)], score="mean", multi_label=True
        )
    (found,) = predict(tiny_model, tiny_processor, rows[1:2], LABELS, max_detections=50).images
    # 20 queries and five names make 100 pairs, of which the best 50 are kept.
    assert len(found["scores"]) == 50
    np.testing.assert_allclose(found["scores"], expected["scores"][:50].double(), atol=1e-6)
    assert (found["image_id"], found["width"], found["height"]) == (8, 200, 100)


def test_a_processors_own_suppression_comes_before_the_best_are_kept(tiny_model, tiny_processor, rows):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, nms_threshold=0.0)
    with torch.no_grad():
        inputs = processor(images=[picture(1)], text=[LABELS])
        (expected,) = processor.post_process_grounded_object_detection(
            tiny_model(**inputs), inputs, 0, 0, target_sizes=[(100, 200)], score="mean", multi_label=True
        )
    every = predict(tiny_model, processor, rows[1:2], LABELS, max_detections=100, nms_threshold=1).images[0]
    assert len(expected["scores"]) < len(every["scores"]) == 100
    # Of these few, only some are among the best 20 of all pairs.
    for most in (100, 20, 5):
        (found,) = predict(tiny_model, processor, rows[1:2], LABELS, max_detections=most).images
        np.testing.assert_allclose(found["scores"], expected["scores"][:most].double(), atol=1e-6)
        assert found["labels"].tolist() == expected["labels"][:most].tolist()


def test_several_prompts_give_the_best_of_all_their_detections(tiny_model, tiny_processor, rows):
    together = predict(tiny_model, tiny_processor, rows, LABELS, labels_per_prompt=2, max_detections=30).images
    apart = [predict(tiny_model, tiny_processor, rows, LABELS[i : i + 2], max_detections=30).images for i in (0, 2, 4)]
    for place, found in enumerate(together):
        scores = np.concatenate([part[place]["scores"] for part in apart])
        labels = np.concatenate([part[place]["labels"] + start for part, start in zip(apart, (0, 2, 4), strict=True)])
        order = np.argsort(-scores, kind="stable")[:30]
        np.testing.assert_allclose(found["scores"], scores[order], rtol=0, atol=SCORES)
        assert found["labels"].tolist() == labels[order].tolist()


def test_labels_that_do_not_fit_one_prompt_are_all_detected(tiny_model, tiny_processor, rows):
    things = ("cat", "dog", "cup", "car", "tree", "hat", "lion")
    many = [f"{colour} {thing}" for colour in ("red", "blue") for thing in things] * 2
    many = [f"{name} {number}" for number, name in enumerate(many)]
    # 28 labels of at least four tokens fit one prompt of the processor's 256 tokens, but not of the model's 64.
    assert len(tiny_processor(text=[many]).prompts[0].chunks) == 1
    found = predict(tiny_model, tiny_processor, rows[:1], many, max_detections=None).images[0]
    assert set(found["labels"].tolist()) == set(range(len(many)))


def test_image_features_are_computed_once_for_all_prompts(tiny_model, tiny_processor, rows):
    calls = []
    hook = tiny_model.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    try:
        predict(tiny_model, tiny_processor, rows[:1], LABELS, labels_per_prompt=1)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_text_is_encoded_once_whatever_the_number_of_images(tiny_model, tiny_processor, rows, monkeypatch):
    encoded, encode = [], type(tiny_model).get_text_features

    def counted(self, ids, *arguments, **options):
        encoded.append(len(ids))
        return encode(self, ids, *arguments, **options)

    monkeypatch.setattr(type(tiny_model), "get_text_features", counted)
    predict(tiny_model, tiny_processor, rows, LABELS, labels_per_prompt=1, batch_size=2)
    assert sum(encoded) == len(LABELS)


def test_the_best_of_each_prompt_are_kept(tiny_model, tiny_processor, rows):
    options = {"labels_per_prompt": 2, "max_detections": None}
    (every,) = predict(tiny_model, tiny_processor, rows[:1], LABELS, **options).images
    (few,) = predict(tiny_model, tiny_processor, rows[:1], LABELS, max_per_prompt=3, **options).images
    for prompt in ([0, 1], [2, 3], [4]):
        best, kept = (image["scores"][np.isin(image["labels"], prompt)] for image in (every, few))
        assert len(best) > len(kept) == 3
        np.testing.assert_array_equal(kept, best[:3])


def test_batch_equals_single_images(tiny_model, tiny_processor, rows):
    together = predict(tiny_model, tiny_processor, rows, LABELS, batch_size=4, max_detections=20).images
    apart = predict(tiny_model, tiny_processor, rows, LABELS, batch_size=1, max_detections=20).images
    same(together, apart)


def test_lists_data_sets_and_streams_give_the_same(tiny_model, tiny_processor, rows):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    plain = predict(tiny_model, tiny_processor, rows, LABELS, max_detections=20).images
    for source in (made, made.to_iterable_dataset(), [{**row, "image": Image.open(row["image"])} for row in rows]):
        same(predict(tiny_model, tiny_processor, source, LABELS, max_detections=20).images, plain)


@pytest.mark.parametrize("as_data_set", [False, True])
def test_an_unreadable_image_is_reported_skipped_and_listed(
    tiny_model, tiny_processor, rows, tmp_path, capsys, as_data_set
):
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").unlink()
    source = rows
    if as_data_set:
        datasets = pytest.importorskip("datasets")
        source = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_iterable_dataset()
    found = predict(tiny_model, tiny_processor, source, LABELS)
    assert [item["image_id"] for item in found.images] == [7, 10]
    assert [item["image_id"] for item in found.failed] == [8, 9]
    assert "1.png" in found.failed[0]["error"]
    assert "2.png" in found.failed[1]["error"]
    assert "image 8 is left out" in capsys.readouterr().err


def test_limit_runs_on_the_first_images_only(tiny_model, tiny_processor, rows):
    assert [item["image_id"] for item in predict(tiny_model, tiny_processor, rows, LABELS, limit=2).images] == [7, 8]


def test_prompts_replace_the_text_but_not_the_numbers_of_labels(tiny_model, tiny_processor, rows):
    renamed = predict(tiny_model, tiny_processor, rows[:1], ["x", "y"], prompts=["cat", "dog"]).images
    same(renamed, predict(tiny_model, tiny_processor, rows[:1], ["cat", "dog"]).images)
    with pytest.raises(ValueError, match="1 prompts for 2 labels"):
        predict(tiny_model, tiny_processor, rows, ["x", "y"], prompts=["cat"])


def test_a_model_in_training_mode_stays_in_it(tiny_model, tiny_processor, rows):
    tiny_model.train()
    try:
        predict(tiny_model, tiny_processor, rows[:1], LABELS)
        assert tiny_model.training
    finally:
        tiny_model.eval()


def test_stored_predictions_are_read_back_bit_equal(tiny_model, tiny_processor, rows, tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionFile(path, {"model": "tiny", "labels": LABELS}) as store:
        found = predict(tiny_model, tiny_processor, rows, LABELS, store=store)
    stored = read_predictions(path)
    assert (stored.header["model"], stored.header["labels"]) == ("tiny", LABELS)
    for one, other in zip(found.images, stored.images, strict=True):
        assert one.keys() == other.keys()
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(one[name], other[name])


def test_an_interrupted_run_continues_where_it_stopped(tiny_model, tiny_processor, rows, tmp_path):
    path = tmp_path / "predictions.jsonl"
    header = {"model": "tiny", "labels": LABELS}

    def stopping():
        yield from rows[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), PredictionFile(path, header) as store:
        predict(tiny_model, tiny_processor, stopping(), LABELS, batch_size=1, store=store)
    # This is what remains if the process is killed while writing the second image.
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    assert [item["image_id"] for item in read_predictions(path).images] == [7]
    read = []
    hook = tiny_model.model.backbone.register_forward_hook(lambda *_: read.append(1))
    try:
        with PredictionFile(path, header) as store:
            found = predict(tiny_model, tiny_processor, rows, LABELS, batch_size=1, store=store)
    finally:
        hook.remove()
    assert len(read) == 3
    same(found.images, predict(tiny_model, tiny_processor, rows, LABELS).images)
    same(read_predictions(path).images, found.images)


def test_an_image_that_failed_is_tried_again(tiny_model, tiny_processor, rows, tmp_path):
    path, header = tmp_path / "predictions.jsonl", {"labels": LABELS}
    saved = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(b"no picture")
    with PredictionFile(path, header) as store:
        predict(tiny_model, tiny_processor, rows, LABELS, store=store)
    assert [item["image_id"] for item in read_predictions(path).failed] == [8]
    (tmp_path / "1.png").write_bytes(saved)
    with PredictionFile(path, header) as store:
        found = predict(tiny_model, tiny_processor, rows, LABELS, store=store)
    assert (found.failed, read_predictions(path).failed) == ([], [])
    assert sorted(item["image_id"] for item in read_predictions(path).images) == [7, 8, 9, 10]


def test_other_settings_cannot_continue_the_same_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionFile(path, {"model": "one", "labels": LABELS}):
        pass
    with pytest.raises(ValueError, match=r"another model \('one', not 'two'\)"):
        PredictionFile(path, {"model": "two", "labels": LABELS})


@pytest.mark.parametrize("content", ["", "{}\n", "[1]\n", '{"format": "other"}\n', "no json\n"])
def test_other_files_are_rejected(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a prediction file|damaged in line 1"):
        read_predictions(path)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionFile(path, {"labels": LABELS}) as store:
        store.append({"image_id": 1, "boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [0]})
    path.write_text(path.read_text() + json.dumps({"image_id": 2, "boxes": [1, 2, 3]}) + "\n")
    with pytest.raises(ValueError, match="damaged in line 3"):
        read_predictions(path)
