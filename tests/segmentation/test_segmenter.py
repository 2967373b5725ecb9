"""Segmenter: its masks are those of transformers' processors and models called by hand; refusals are one sentence."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import DetrConfig

from gdino_hf import Detections, Detector
from gdino_hf.segmentation import Segmenter
from tiny_segmenters import KINDS, SIDE, by_hand, make_segmenter, photo, save_segmenter

LANDSCAPE, PORTRAIT = (120, 80), (70, 130)
# Boxes run in passes of several sizes, which changes the last digits of logits; a pixel closer to the threshold than
# this may then fall on either side of it.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of segmenter."""
    return {kind: save_segmenter(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def boxes_in(size, number, seed=0):
    corners = np.random.default_rng(seed).random((number, 2, 2)) * size
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    return Detections(boxes, np.linspace(1, 0.1, number), np.arange(number) % 2, ("cat", "dog"), size)


def assert_masks_of(found, logits):
    """Compare masks with logits; returns how many pixels are of an object."""
    assert found.masks.shape == logits.shape
    sure = np.abs(logits) > ROUNDING
    assert np.array_equal(found.masks[sure], (logits > 0)[sure])
    return int(found.masks.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, (SIDE, SIDE), (1, 9)])
@pytest.mark.parametrize("number", [1, 50])
def test_masks_are_those_of_transformers_called_by_hand(folders, kind, size, number):
    segmenter, image, found = Segmenter(folders[kind]), photo(size), boxes_in(size, number)
    logits = by_hand(segmenter.model, folders[kind], image, found.boxes)
    segmented = segmenter(image, found)
    pixels = assert_masks_of(segmented, logits)
    # The weights are random, but neither everything nor nothing is an object, and boxes have different masks.
    assert number == 1 or 0 < pixels < segmented.masks.size
    assert number == 1 or len({mask.tobytes() for mask in segmented.masks}) > 1 or size == (1, 9)
    assert np.array_equal(segmented.boxes, found.boxes)
    assert segmented.text_labels == found.text_labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_pictures_has_the_masks_of_each(folders, kind):
    segmenter, sizes, numbers = Segmenter(folders[kind]), (LANDSCAPE, PORTRAIT, (33, 33), LANDSCAPE), (3, 17, 0, 1)
    images = [photo(size, seed) for seed, size in enumerate(sizes)]
    found = [boxes_in(size, number, seed) for seed, (size, number) in enumerate(zip(sizes, numbers, strict=True))]
    segmented = segmenter(images, found, batch_size=2)
    assert [each.masks.shape for each in segmented] == [(n, h, w) for n, (w, h) in zip(numbers, sizes, strict=True)]
    for image, each, number in zip(images, segmented, numbers, strict=True):
        if number:
            assert_masks_of(each, by_hand(segmenter.model, folders[kind], image, each.boxes))


class CountsPasses(torch.nn.Module):
    """Counts what passes through a module."""

    def __init__(self, module):
        super().__init__()
        self.module, self.sizes = module, []
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, positional, named):
        self.sizes.append((positional or tuple(named.values()))[0].shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_encoded_once_and_its_boxes_pass_in_parts(folders, kind):
    segmenter = Segmenter(folders[kind], boxes_at_once=8)
    encoder, decoder = CountsPasses(segmenter.model.vision_encoder), CountsPasses(segmenter.model.mask_decoder)
    segmenter(photo(LANDSCAPE), boxes_in(LANDSCAPE, 50))
    assert [tuple(size) for size in encoder.sizes] == [(1, 3, SIDE, SIDE)]
    assert len(decoder.sizes) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_without_boxes_has_no_masks_and_costs_no_pass(folders, kind):
    segmenter = Segmenter(folders[kind])
    encoder = CountsPasses(segmenter.model.vision_encoder)
    segmented = segmenter(photo(PORTRAIT), boxes_in(PORTRAIT, 0))
    assert segmented.masks.shape == (0, 130, 70)
    assert encoder.sizes == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_object_has_the_masks_of_its_folder(folders, kind):
    image, found = photo(LANDSCAPE), boxes_in(LANDSCAPE, 5)
    of_folder = Segmenter(folders[kind])
    loaded = Segmenter(of_folder.model)(image, found)
    in_memory = Segmenter(make_segmenter(kind))(image, found)
    assert loaded == of_folder(image, found) == in_memory


def test_half_precision_gives_nearly_the_same_masks(folders):
    image, found = photo(LANDSCAPE), boxes_in(LANDSCAPE, 6)
    exact, half = (Segmenter(folders["sam2"], dtype=dtype)(image, found).masks for dtype in (None, "bfloat16"))
    assert (exact == half).mean() > 0.95


def test_boxes_tightened_to_masks_are_their_bounds(folders):
    segmenter, image, found = Segmenter(folders["sam"], tighten=True), photo(LANDSCAPE), boxes_in(LANDSCAPE, 12)
    tight, loose = segmenter(image, found), Segmenter(folders["sam"])(image, found)
    assert np.array_equal(tight.masks, loose.masks)
    for box, before, mask in zip(tight.boxes, found.boxes, tight.masks, strict=True):
        if not mask.any():
            assert np.array_equal(box, before)
            continue
        x1, y1, x2, y2 = box.astype(int)
        assert mask[y1:y2, x1:x2].sum() == mask.sum()
        assert mask[y1:y2, [x1, x2 - 1]].any(0).all()
        assert mask[[y1, y2 - 1], x1:x2].any(1).all()


def test_a_detector_with_a_segmenter_finds_masks_everywhere(folders):
    segmenter = Segmenter(folders["sam2"])
    plain, masking = Detector("nano", device="cpu"), Detector("nano", device="cpu", segmenter=segmenter)
    images, options = [photo(LANDSCAPE), photo(PORTRAIT, 1)], {"threshold": 0.0, "top_k": 4}
    expected = [segmenter(image, plain(image, ["cat", "dog"], **options)) for image in images]
    assert sum(map(len, expected)) > 0
    assert masking(images, ["cat", "dog"], **options) == expected
    # A stream reads small pictures in batches, whose sums are rounded differently.
    for (_, found), whole in zip(masking.stream(images, ["cat", "dog"], **options), expected, strict=True):
        assert found.text_labels == whole.text_labels
        assert np.allclose(found.boxes, whole.boxes, atol=1e-3)
        assert np.mean(np.asarray(found.masks) != np.asarray(whole.masks)) < 1e-3
    grounded = masking.ground(images[0], "a cat beside a dog", threshold=0.0, top_k=2)
    assert grounded.masks.shape == (2, 80, 120)
    assert grounded.spans is not None


def test_what_cannot_be_used_is_refused_in_one_sentence(folders, tmp_path):
    other, empty, lacking = tmp_path / "detr", tmp_path / "empty", tmp_path / "lacking"
    DetrConfig().save_pretrained(other)
    empty.mkdir()
    save_segmenter("sam", lacking)
    weights = next(lacking.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(weights).items() if "iou_token" not in k}, weights, {"format": "pt"})
    wrong = save_segmenter("sam2", tmp_path / "wrong")
    settings = json.loads((wrong / "preprocessor_config.json").read_text())
    (wrong / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 32, "width": 32}}))
    for model, error, why in (
        (tmp_path / "missing", ValueError, "there is no such folder"),
        ("no/such-model", ValueError, "cannot be loaded"),
        (other, ValueError, "its model_type is 'detr', which boxes cannot prompt"),
        (empty, ValueError, "there is no config.json in it"),
        (lacking, ValueError, "its files lack 1 weight"),
        (wrong, ValueError, "makes pictures of 32x32 pixels, its model sees 64x64"),
        (torch.nn.Linear(1, 1), TypeError, "a model that boxes can prompt .* got Linear"),
        (None, TypeError, "got NoneType"),
    ):
        with pytest.raises(error, match=why) as caught:
            Segmenter(model)
        assert re.fullmatch(r"[^\n]+\.", str(caught.value)), model
    for options, why in (
        ({"dtype": "int8"}, "dtype is 'int8'; choose float32"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used here"),
        ({"boxes_at_once": 0}, "boxes_at_once"),
    ):
        with pytest.raises(ValueError, match=why):
            Segmenter(folders["sam"], **options)


def test_pictures_and_detections_that_do_not_belong_together_are_refused(folders):
    segmenter, found = Segmenter(folders["sam"]), boxes_in(LANDSCAPE, 2)
    with pytest.raises(ValueError, match="70x130 pixels, but the boxes are from one of 120x80"):
        segmenter(photo(PORTRAIT), found)
    with pytest.raises(ValueError, match="There are 2 pictures and detections of 1; give as many"):
        segmenter([photo(LANDSCAPE)] * 2, [found])
    with pytest.raises(TypeError, match="found is a list"):
        segmenter(photo(LANDSCAPE), [found])
    with pytest.raises(TypeError, match="segmenter is a str"):
        Detector("nano", device="cpu", segmenter=str(folders["sam"]))
