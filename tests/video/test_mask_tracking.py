"""MaskTracker: the masks of transformers' own session, ids that stay, halves that equal the whole, bounded memory."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Sam2VideoInferenceSession

from gdino_hf import Detections, Detector
from gdino_hf.segmentation import Segmenter
from gdino_hf.video.mask_tracking import MaskTracker, mask_bounds
from gdino_hf.video.object_memory import ObjectMemory
from gdino_hf.video.tracking import Tracker
from tiny_segmenters import SIDE, make_segmenter, make_video_segmenter, photo, save_video_segmenter

NAMES, SIZE = ("cat", "dog"), (96, 72)
BOX = np.array([20, 10, 60, 50], dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    return make_video_segmenter()


@pytest.fixture(scope="module")
def pictures():
    """A camera that moves over a picture."""
    whole = photo((160, 72), seed=3)
    return [whole.crop((4 * number, 0, 4 * number + SIZE[0], SIZE[1])) for number in range(16)]


def detected(boxes, labels=None, scores=None):
    labels = [0] * len(boxes) if labels is None else labels
    return Detections(np.array(boxes).reshape(-1, 4), scores or [0.9] * len(boxes), labels, NAMES, SIZE)


def shifted(number):
    """The box of what stands still in the picture while the camera moves."""
    return BOX + np.array([-4 * number, 0] * 2, dtype=np.float32) + 8


def by_hand(model, pictures, prompts):
    """Masks of one object from one of transformers' sessions that keeps everything: prompts are boxes by frame."""
    session = Sam2VideoInferenceSession(dtype=torch.float32)
    session.obj_id_to_idx(7)
    masks = []
    for number, picture in enumerate(pictures):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        pixels = (pixels - mean) / std
        if number in prompts:
            if number:
                model(inference_session=session, frame=pixels, frame_idx=number)
            scaled = torch.from_numpy(prompts[number]) * torch.tensor([SIDE / SIZE[0], SIDE / SIZE[1]] * 2)
            points = {
                "point_coords": scaled.reshape(1, 1, 2, 2),
                "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),
            }
            session.add_point_inputs(0, number, points)
            session.obj_with_new_inputs = [7]
        made = model(inference_session=session, frame=pixels, frame_idx=number)
        logits = F.interpolate(made.pred_masks.float(), SIZE[::-1], mode="bilinear", align_corners=False)
        masks.append((logits[0, 0] > 0).numpy())
    return masks


@pytest.mark.parametrize("prompts", [(0,), (0, 9)])
def test_masks_are_those_of_a_session_that_keeps_everything(model, pictures, prompts):
    boxes = {number: shifted(number) for number in prompts}
    expected = by_hand(model, pictures, boxes)
    memory = ObjectMemory(model)
    one = memory.new()
    for number, picture in enumerate(pictures):
        memory.see(picture, number)
        mask = memory.follow(one) if number else memory.prompt(one, boxes[0])
        if number and number in boxes:
            mask = memory.prompt(one, boxes[number])
        assert (mask != expected[number]).mean() < 1e-3, number
    # The figures say something: masks differ from frame to frame and are neither empty nor full.
    assert 0 < np.mean(expected) < 1
    assert len({mask.tobytes() for mask in expected}) > 8
    if len(prompts) > 1:
        assert any((a != b).any() for a, b in zip(expected, by_hand(model, pictures, {0: boxes[0]}), strict=True))


def run(tracker, pictures, every=3, first=0):
    """Track one cat whose box is known in every third frame."""
    for number, picture in enumerate(pictures, start=first):
        if number % every:
            yield tracker.between(detected([]), number / 10, picture)
        else:
            yield tracker.update(detected([shifted(number)]), number / 10, picture)


def test_an_object_has_an_id_from_its_second_detection_and_a_mask_in_every_frame(model, pictures):
    found = list(run(MaskTracker(model), pictures))
    assert [len(each) for each in found[:3]] == [0, 0, 0]
    assert [each.track_ids.tolist() for each in found[3::3]] == [[1]] * 5
    for number, each in enumerate(found[3:], start=3):
        assert each.masks.shape == (len(each), 72, 96)
        if number % 3 == 0:
            np.testing.assert_array_equal(each.boxes[0], np.clip(shifted(number), 0, [*SIZE, *SIZE]))
        for box, mask in zip(each.boxes, each.masks, strict=True):
            # Between detections, boxes are the bounds of masks.
            if number % 3:
                np.testing.assert_array_equal(box, mask_bounds(mask))
    assert sum(len(each) for each in found) > 8


def test_ids_and_masks_are_equal_whether_run_whole_or_in_two_halves(model, pictures, tmp_path):
    whole = list(run(MaskTracker(model), pictures))
    for cut in (4, 6):
        first = MaskTracker(model)
        halves = list(run(first, pictures[:cut]))
        first.save(tmp_path / "state.json")
        second = MaskTracker.load(tmp_path / "state.json", model)
        halves += list(run(second, pictures[cut:], first=cut))
        for one, other in zip(whole, halves, strict=True):
            np.testing.assert_array_equal(one.masks, other.masks)
            np.testing.assert_array_equal(one.boxes, other.boxes)
            assert one.track_ids.tolist() == other.track_ids.tolist()


def test_labels_are_kept_apart_and_two_objects_keep_their_ids(model, pictures):
    tracker, moved = MaskTracker(model), np.array([30, 15, 30, 15], dtype=np.float32)
    for number, picture in enumerate(pictures[:5]):
        boxes = [shifted(number), shifted(number) + moved, shifted(number)]
        found = tracker.update(detected(boxes, [0, 0, 1]), number / 10, picture)
        if number:
            assert found.track_ids.tolist() == [1, 2, 3]
            assert found.text_labels == ["cat", "cat", "dog"]
    # Seen a single time, a box is no track.
    for number, picture in enumerate(pictures[5:8], start=5):
        boxes = [shifted(number), [0, 60, 12, 72]] if number == 5 else [shifted(number)]
        found = tracker.update(detected(boxes), number / 10, picture)
    assert tracker.count == 3


def test_low_scores_continue_an_object_and_begin_none(model, pictures):
    tracker = MaskTracker(model, threshold=0.5)
    assert tracker.low_thresholds(("cat",)) == {"cat": 0.25}
    for number, score in enumerate([0.3, 0.9, 0.3, 0.3]):
        found = tracker.update(detected([shifted(number)], scores=[score]), number / 10, pictures[number])
    assert found.track_ids.tolist() == [1]
    assert found.scores.tolist() == [pytest.approx(0.3)]


def test_an_object_that_is_not_detected_is_given_up_after_patience(model, pictures):
    tracker = MaskTracker(model, patience=0.5)
    for number, picture in enumerate(pictures[:2]):
        tracker.update(detected([shifted(number)]), number / 10, picture)
    for number, picture in enumerate(pictures[2:10], start=2):
        tracker.update(detected([]), number / 10, picture)
        assert len(tracker._objects) == (number <= 6), number
    tracker.update(detected([shifted(10)]), 1.0, pictures[10])
    assert tracker.update(detected([shifted(11)]), 1.1, pictures[11]).track_ids.tolist() == [2]


def test_memory_does_not_grow_with_the_video(model, pictures):
    tracker, sizes = MaskTracker(model), []
    for number in range(24):
        tracker.update(detected([shifted(number % 16)]), number / 10, pictures[number % 16])
        memory = tracker._objects[0].memory
        outputs = memory.output_dict_per_obj[0]
        assert not memory.processed_frames
        sizes.append((len(outputs["cond_frame_outputs"]), len(outputs["non_cond_frame_outputs"])))
    # The tiny model reads pointers of four frames before the current one, and that is kept, too.
    assert sizes[8:] == [(1, 5)] * 16


def test_a_detector_tracks_with_a_model_from_a_folder(pictures, tmp_path):
    folder = save_video_segmenter(tmp_path / "sam2")
    cat = Image.open("demo/examples/cat.jpg").resize((240, 160))
    frames = [Image.new("RGB", (320, 200), (120, 140, 120)) for _ in range(5)]
    for number, frame in enumerate(frames):
        frame.paste(cat, (6 * number, 10))
    detector = Detector("nano", device="cpu")
    found = [frame.found for frame in detector.track(frames, ["cat"], every=2, tracker=str(folder))]
    assert [each.track_ids.tolist() for each in found][2::2] == [[1], [1]]
    assert all(each.masks.shape == (len(each), 200, 320) for each in found)
    detector.segmenter = Segmenter(make_segmenter("sam2"))
    with pytest.raises(ValueError, match=r"The tracker makes masks, and so does detector.segmenter"):
        detector.track(frames, ["cat"], tracker=str(folder))


def test_what_cannot_be_used_is_refused_in_one_sentence(model, pictures, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam"}))
    with pytest.raises(ValueError, match=r"its model_type is 'sam', which follows nothing through videos"):
        MaskTracker(tmp_path)
    with pytest.raises(TypeError, match=r"got Sam2Model\."):
        MaskTracker(make_segmenter("sam2"))
    for options, sentence in (({"threshold": 2}, "threshold is 2"), ({"patience": 0}, "patience is 0")):
        with pytest.raises(ValueError, match=sentence):
            MaskTracker(model, **options)
    tracker = MaskTracker(model)
    tracker.update(detected([BOX]), 0.0, pictures[0])
    tracker.save(tmp_path / "masks.json")
    Tracker().save(tmp_path / "boxes.json")
    with pytest.raises(ValueError, match="it is no state of a tracker by masks"):
        MaskTracker.load(tmp_path / "boxes.json", model)
    with pytest.raises(ValueError, match="it is no state of a tracker"):
        Tracker.load(tmp_path / "masks.json")
    (tmp_path / "other.json").write_text(json.dumps(tracker.state() | {"tracker": "facebook/sam2.1-hiera-large"}))
    with pytest.raises(ValueError, match=r"saved with the model facebook/sam2.1-hiera-large, not with Sam2VideoModel"):
        MaskTracker.load(tmp_path / "other.json", model)
    for change in ({"values": 3}, {"values": {"!": "dict", "items": []}}, {"version": 0}):
        (tmp_path / "broken.json").write_text(json.dumps(tracker.state() | change))
        with pytest.raises(ValueError, match=r"broken.json cannot be read"):
            MaskTracker.load(tmp_path / "broken.json", model)
