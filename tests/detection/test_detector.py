"""The engine: equal to the model run by hand, text encoded once, images once, whatever the number of labels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detector, GDinoProcessor, Vocabulary
from gdino_hf.detection.detector import DetectionError, _say_cast_once
from gdino_hf.detection.text_features import text_fingerprints
from gdino_hf.model.box_ops import cxcywh_to_xyxy
from gdino_hf.model.text_prompt import build_prompt
from random_models import make_random_model

LABELS = ["cat", "dog", "person", "cup", "remote control", "red car", "hat", "table", "big cats", "traffic light"]
# Prompts and pictures in one batch sum in another order than alone.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def detector(tiny_config, tiny_processor):
    """A detector in float64; in float32, rounding decides which of two nearly equal proposals is selected."""
    return Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)


def picture(width=80, height=64, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def run_by_hand(detector, image, prompt):
    """Yield each chunk with the scores (Q, N) and boxes (Q, 4) in pixels that a plain call of the model gives."""
    inputs = detector.processor(images=image)
    scale = torch.tensor([image.width, image.height, image.width, image.height])
    for chunk in prompt.chunks:
        with torch.no_grad():
            outputs = detector.model(**inputs, input_ids=torch.tensor([chunk.input_ids]))
        probabilities = outputs.logits[0].float().sigmoid()
        scores = torch.stack([probabilities[:, a:b].amax(-1) for a, b in chunk.spans], -1)
        yield chunk, scores, cxcywh_to_xyxy(outputs.pred_boxes[0].float()) * scale


def test_the_processors_own_suppression_holds_where_a_call_gives_none(detector, tiny_processor):
    processor = GDinoProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, nms_threshold=0.0)
    suppressing = Detector(detector.model, processor=processor, device=None, optimize=False)
    image, every = picture(), {"threshold": 0.0, "multi_label": True}
    fewer = suppressing(image, LABELS, **every)
    assert len(fewer) < len(detector(image, LABELS, **every))
    assert fewer == detector(image, LABELS, nms_threshold=0.0, **every)
    assert suppressing(image, LABELS, nms_threshold=1, **every) == detector(image, LABELS, **every)
    caption = "a cat beside a red car"
    assert suppressing.ground(image, caption, threshold=0.0) == detector.ground(
        image, caption, threshold=0.0, nms_threshold=0.0
    )


@pytest.mark.parametrize("per_prompt", [None, 3, 1])
def test_many_labels_equal_each_prompt_run_by_hand(detector, per_prompt):
    image = picture()
    vocabulary = Vocabulary(LABELS, labels_per_prompt=per_prompt)
    found = detector(image, vocabulary, threshold=0.0, multi_label=True)
    prompt = vocabulary.prompt(detector.processor.tokenizer, 64)
    rows, presence = [], {}
    for chunk, scores, boxes in run_by_hand(detector, image, prompt):
        for column, index in enumerate(chunk.label_indices):
            presence[LABELS[index]] = scores[:, column].max().item()
            rows += [(scores[query, column].item(), index, boxes[query].tolist()) for query in range(len(boxes))]
    rows.sort(key=lambda row: -row[0])
    assert len(found) == len(rows)
    assert found.scores.tolist() == pytest.approx([row[0] for row in rows], abs=ROUNDING)
    assert found.presence == pytest.approx(presence, abs=ROUNDING)
    wanted = {(index, *(round(side) for side in box)) for _, index, box in rows}
    near = [(d.label, *(round(side) for side in d.box)) in wanted for d in found]
    assert sum(near) > 0.9 * len(near)


def test_boxes_scores_and_labels_are_those_of_the_processor(detector):
    image = picture()
    found = detector(image, "cat, dog, remote control", threshold=0.4, nms_threshold=0.6, top_k=7)
    labels = sorted(["cat", "dog", "remote control"])
    inputs = detector.processor(images=image, text=[build_prompt(labels, detector.processor.tokenizer, 64)])
    with torch.no_grad():
        outputs = detector.model(**inputs)
    (wanted,) = detector.processor.post_process_grounded_object_detection(
        outputs, inputs, threshold=0.4, text_threshold=0.0, nms_threshold=0.6, top_k=7, target_sizes=[(64, 80)]
    )
    assert len(found) > 0
    assert found.text_labels == wanted["text_labels"]
    assert found.scores.tolist() == pytest.approx(wanted["scores"].tolist(), abs=ROUNDING)
    torch.testing.assert_close(torch.from_numpy(found.boxes), wanted["boxes"].clamp(min=0), rtol=0, atol=1e-3)


def test_results_depend_neither_on_order_nor_on_duplicates(detector):
    rng, image = random.Random(1), picture(seed=1)
    first = detector(image, Vocabulary(LABELS, labels_per_prompt=4), threshold=0.3)
    for _ in range(3):
        labels = rng.sample(LABELS, len(LABELS)) + rng.sample(LABELS, 2)
        found = detector(image, Vocabulary(labels, labels_per_prompt=4), threshold=0.3)
        assert found.presence == first.presence
        assert found.text_labels == first.text_labels
        assert (found.boxes == first.boxes).all()


def test_batches_equal_single_pictures(detector):
    images = [picture(80, 64, 1), picture(64, 96, 2), picture(50, 50, 3), picture(96, 60, 4)]
    vocabulary = Vocabulary(LABELS, labels_per_prompt=3)
    together = detector(images, vocabulary, threshold=0.3, batch_size=3)
    for image, found in zip(images, together, strict=True):
        alone = detector(image, vocabulary, threshold=0.3)
        assert found.text_labels == alone.text_labels
        assert found.size == image.size
        assert found.scores.tolist() == pytest.approx(alone.scores.tolist(), abs=ROUNDING)


def test_text_is_encoded_once_and_the_backbone_runs_once_per_picture(detector):
    calls = []
    handle = detector.model.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    try:
        vocabulary = Vocabulary(["face", "ball", *LABELS], labels_per_prompt=2)
        detector.texts.forget()
        before = detector.texts.encoded
        detector(picture(seed=5), vocabulary)
        assert len(calls) == 1
        assert detector.texts.encoded == before + 6
        detector(picture(seed=6), vocabulary)
        assert len(calls) == 2
        assert detector.texts.encoded == before + 6
    finally:
        handle.remove()


def test_aliases_take_the_best_or_the_mean_of_their_scores(detector):
    image = picture()
    options = {"threshold": 0.0, "multi_label": True}
    best = detector(image, Vocabulary({"animal": ["cat", "dog"]}), **options)
    mean = detector(image, Vocabulary({"animal": ["cat", "dog"]}, combine="mean"), **options)
    apart = detector(image, ["cat", "dog"], **options)
    assert best.presence["animal"] == pytest.approx(max(apart.presence.values()), abs=ROUNDING)
    ((_, scores, _),) = run_by_hand(detector, image, Vocabulary("cat, dog").prompt(detector.processor.tokenizer, 64))
    assert best.scores.tolist() == pytest.approx(sorted(scores.amax(-1).tolist(), reverse=True), abs=ROUNDING)
    assert mean.scores.tolist() == pytest.approx(sorted(scores.mean(-1).tolist(), reverse=True), abs=ROUNDING)


def test_a_label_with_a_lower_threshold_may_pass_where_a_better_one_fails(detector):
    image = picture()
    both = detector(image, ["cat", "dog"], threshold=0.0, multi_label=True)
    strict = Vocabulary(["cat", "dog"], thresholds={"cat": 1.0, "dog": 0.0})
    found = detector(image, strict)
    assert set(found.text_labels) == {"dog"}
    assert sorted(found.scores.tolist()) == pytest.approx(
        sorted(d.score for d in both if d.text_label == "dog"), abs=ROUNDING
    )


def test_negative_labels_compete_and_are_left_out(detector):
    image = picture()
    rivals = detector(image, ["cat", "dog", "cup"], threshold=0.0)
    found = detector(image, ["cat"], negative=["dog", "cup"], threshold=0.0)
    assert set(found.presence) == {"cat"}
    assert found.scores.tolist() == pytest.approx([d.score for d in rivals if d.text_label == "cat"], abs=ROUNDING)


def test_saved_vocabulary_needs_no_text_encoder(detector, tmp_path, tiny_config, tiny_processor):
    detector.vocabulary(LABELS, labels_per_prompt=3).save(tmp_path / "v.safetensors")
    same = Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    found = same(picture(), loaded, threshold=0.2)
    assert same.texts.encoded == 0
    wanted = detector(picture(), Vocabulary(LABELS, labels_per_prompt=3), threshold=0.2)
    assert found.scores.tolist() == pytest.approx(wanted.scores.tolist(), abs=ROUNDING)
    assert found.text_labels == wanted.text_labels


def test_vocabulary_of_another_model_is_refused(detector, tiny_config, tiny_processor):
    other = Detector(
        make_random_model(tiny_config, seed=1).double(), processor=tiny_processor, device=None, optimize=False
    )
    vocabulary = detector.vocabulary("cat")
    with pytest.raises(ValueError, match="computed by another model"):
        other(picture(), vocabulary)
    assert other(picture(), Vocabulary("cat"), threshold=0.0).names == ("cat",)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["to narrower", "from narrower"])
def test_vocabulary_of_the_same_model_in_another_dtype_is_cast_and_said_once(
    tmp_path, tiny_config, tiny_processor, caplog, narrow, direction
):
    detectors = [
        Detector(make_random_model(tiny_config).to(dtype), processor=tiny_processor, device=None, optimize=False)
        for dtype in (torch.float32, narrow)
    ]
    one, other = detectors if direction == "to narrower" else detectors[::-1]
    one.vocabulary(LABELS).save(tmp_path / "v.safetensors")
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    _say_cast_once.cache_clear()
    for _ in range(2):
        remade = other.vocabulary(loaded)
    assert other.texts.encoded == 0
    assert {x.dtype for x in remade.encoded.features.values()} == {other.model.dtype}
    assert remade.encoded.fingerprint == other.texts.fingerprint
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "by this model in another dtype" in caplog.text
    found, wanted = other(picture(), loaded, threshold=0.0), other(picture(), LABELS, threshold=0.0)
    assert [*found.presence.values()] == pytest.approx([*wanted.presence.values()], abs=0.02)


def test_weights_that_a_wider_dtype_holds_are_the_same_text_encoder(tiny_config):
    """Optimizing a bfloat16 model may turn it to float32, where that is faster."""
    model = make_random_model(tiny_config)
    exact, *narrower = text_fingerprints(model)
    assert len({exact, *narrower}) == 3
    assert text_fingerprints(model.double()) == (exact, *narrower)
    assert text_fingerprints(model.bfloat16()) == text_fingerprints(model.float()) == (narrower[0],)


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.05)])
def test_a_text_encoder_that_differs_in_one_weight_is_another(tmp_path, tiny_config, tiny_processor, dtype, change):
    model = make_random_model(tiny_config)
    with torch.no_grad():
        model.base_model.text_projection.bias[0] = 0.5
    Detector(model, processor=tiny_processor, device=None, optimize=False).vocabulary("cat").save(tmp_path / "v")
    with torch.no_grad():
        model.base_model.text_projection.bias[0] += change
    changed = Detector(model.to(dtype), processor=tiny_processor, device=None, optimize=False)
    with pytest.raises(ValueError, match="encoded to None") as refusal:
        changed(picture(), Vocabulary.load(tmp_path / "v"))
    assert "\n" not in str(refusal.value)
    kept = Vocabulary.load(tmp_path / "v")
    kept.encoded = None
    assert changed(picture(), kept, threshold=0.0).names == ("cat",)


def test_features_are_forgotten_beyond_the_store(detector):
    store = type(detector.texts)(detector.model, size=8)
    prompts = [(2, token, 7, 3) for token in (60, 61, 62)]
    first = store.get(prompts)
    assert store.encoded == 3
    again = store.get(prompts[1:])
    assert store.encoded == 3
    assert all(torch.equal(x, y) for x, y in zip(first[1:], again, strict=True))
    store.get(prompts[:1])
    assert store.encoded == 4


def test_text_features_do_not_depend_on_the_number_of_threads(tiny_config, tiny_processor):
    detector = Detector(make_random_model(tiny_config), processor=tiny_processor, device=None)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            detector.texts.forget()
            found.append(detector.vocabulary(LABELS, labels_per_prompt=1).encoded.features)
            # Text that is encoded on the way to a picture's detections, too.
            detector.texts.forget()
            detector(picture(), Vocabulary(LABELS, labels_per_prompt=1))
            found.append(dict(zip(found[0], detector.texts.get(list(found[0])), strict=True)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][tokens], other[tokens]) for tokens in found[0])


def test_a_vocabulary_beyond_the_store_is_encoded_once(detector):
    detector.texts = type(detector.texts)(detector.model, size=8)
    for number in range(2):
        detector(picture(seed=number), Vocabulary(LABELS, labels_per_prompt=1))
        assert detector.texts.encoded == len(LABELS)


def test_every_kind_of_picture_gives_the_same_detections(detector, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    array = torch.from_numpy(np.array(image))
    wanted = detector(image, "cat", threshold=0.0)
    content = (tmp_path / "a.png").read_bytes()
    for each in (tmp_path / "a.png", str(tmp_path / "a.png"), content, array.numpy(), array.permute(2, 0, 1)):
        found = detector(each, "cat", threshold=0.0)
        assert (found.boxes == wanted.boxes).all()
    assert detector(str(tmp_path / "a.png"), "cat").source == str(tmp_path / "a.png")


def test_nano_finds_the_cat_through_its_name(example_folder):
    found = Detector("nano", device="cpu")(example_folder / "cat.jpg", ["cat", "dog"], threshold=0.2)
    assert found.text_labels[0] == "cat"
    assert found.presence["cat"] > found.presence["dog"]
    assert found.plot().size == found.size


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": 3}, TypeError, "takes a Hub id, a folder"),
        ({"model": "/nowhere"}, ValueError, "/nowhere cannot be loaded"),
        ({"dtype": "float8"}, ValueError, "dtype is 'float8'"),
        ({"device": "quantum"}, ValueError, "quantum cannot be used here"),
        ({"dtype": "int8", "optimize": False}, ValueError, "int8 is for optimized models"),
    ],
)
def test_a_detector_that_cannot_be_made_says_why(given, error, message):
    with pytest.raises(error, match=message):
        Detector(**given)


def test_options_that_do_not_exist_are_named(detector):
    with pytest.raises(TypeError, match="no option 'treshold'"):
        detector(picture(), "cat", treshold=0.2)
    with pytest.raises(TypeError, match="cannot be given beside a Vocabulary"):
        detector(picture(), Vocabulary("cat"), negative="dog")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"threshold": 2}, "threshold must be within 0..1, got 2"),
        ({"threshold": "0.2"}, "threshold must be a number within 0..1, got '0.2'"),
        ({"threshold": float("nan")}, "threshold must be within 0..1, got nan"),
        ({"threshold": None}, "threshold must be a number within 0..1, got None"),
        ({"nms_threshold": True}, "nms_threshold must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5; give a whole number"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number, at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; give a whole number"),
        ({"tiles": 31}, "tile is 31 pixels; give a whole number, at least 32"),
        ({"tiles": 200.5}, "tile is 200.5 pixels; give a whole number"),
        ({"tiles": 64, "overlap": 1}, "overlap is 1"),
    ],
)
def test_options_out_of_their_range_are_refused_with_value_and_range(detector, option, message):
    for call in (detector, detector.stream):
        with pytest.raises(ValueError, match=message):
            call([picture()], "cat", **option)
    if "batch_size" not in option:
        with pytest.raises(ValueError, match=message):
            detector.ground(picture(), "a cat", **option)


def test_no_pictures_give_no_detections(detector):
    assert detector([], "cat") == []


def test_stream_keeps_the_order_and_gives_errors_as_values(detector, tmp_path):
    sources = []
    for number in range(7):
        sources.append(tmp_path / f"{number}.png")
        picture(60 + 4 * number, 64, number).save(sources[-1])
    sources[2].write_bytes(b"no picture")
    sources.insert(5, "/nowhere/x.jpg")
    vocabulary = Vocabulary(LABELS, labels_per_prompt=4)
    found = list(detector.stream(iter(sources), vocabulary, batch_size=3, readers=2, threshold=0.2))
    assert [source for source, _ in found] == sources
    for source, result in found:
        if source in (sources[2], "/nowhere/x.jpg"):
            assert isinstance(result, DetectionError)
            assert result.source == source
            assert str(source) in str(result)
        else:
            alone = detector(source, vocabulary, threshold=0.2)
            assert result.text_labels == alone.text_labels
            assert result.source == str(source)


@pytest.mark.parametrize(("options", "most"), [({"batch_size": 1}, 6), ({}, 9)])
def test_stream_reads_no_further_than_it_must(detector, options, most):
    read = []

    def pictures():
        for number in range(1000):
            read.append(number)
            yield picture(seed=number)

    stream = detector.stream(pictures(), "cat", ahead=3, **options)
    next(stream)
    stream.close()
    assert len(read) <= most


def test_a_picture_that_breaks_the_model_does_not_break_its_batch(detector):
    fine = picture()
    bad = Image.new("RGB", (1, 5000))
    results = [found for _, found in detector.stream([fine, bad, fine], "cat", batch_size=3, threshold=0.0)]
    assert [isinstance(found, DetectionError) for found in results] in ([False] * 3, [False, True, False])
    assert results[0].text_labels == results[2].text_labels


def test_stream_checks_labels_before_it_starts(detector):
    with pytest.raises(ValueError, match="names nothing"):
        detector.stream([], "")
