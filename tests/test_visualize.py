"""Tests of annotated images: positions of lines and labels, colours, and that the original stays unchanged."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.visualize import draw_detections, label_color, text_color

# A box is tinted with a tenth of its colour.
TINT = 0.10
INFINITY = float("inf")


def result(*found):
    """Return a processor result made from (label, score, box) triples."""
    return {
        "text_labels": [label for label, _, _ in found],
        "scores": torch.tensor([score for _, score, _ in found]),
        "labels": torch.arange(len(found)),
        "boxes": torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4),
    }


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def rows_of(picture, color):
    """Return a (height, width) mask, True where the image has exactly this colour."""
    return (np.asarray(picture) == np.array(color)).all(-1)


def test_the_lines_of_a_box_lie_on_its_sides():
    drawn = draw_detections(grey(200, 150), result(("cat", 0.9, [50, 60, 120, 110])), line_width=2, font_size=11)
    line = rows_of(drawn, label_color("cat"))
    assert line[61:111, [50, 51, 119, 120]].all()
    assert line[[60, 61, 109, 110], 50:121].all()
    # Outside the box, only its label above it has this colour.
    assert not line[62:, :50].any()
    assert not line[62:, 121:].any()
    assert not line[111:].any()


def test_the_inside_is_tinted_and_the_rest_unchanged():
    drawn = np.asarray(draw_detections(grey(200, 150), result(("cat", 0.9, [50, 60, 120, 110]))))
    tinted = [round(128 * (1 - TINT) + channel * TINT) for channel in label_color("cat")]
    assert np.abs(drawn[85, 85].astype(int) - tinted).max() <= 1
    assert (drawn[115:] == 128).all()
    assert (drawn[:, 180:] == 128).all()


def test_the_original_image_is_not_changed():
    picture = grey(60, 60)
    draw_detections(picture, result(("cat", 0.9, [5, 5, 50, 50])))
    assert (np.asarray(picture) == 128).all()


def test_without_detections_the_image_is_unchanged():
    picture = grey(60, 40)
    assert np.array_equal(draw_detections(picture, result()), picture)


def test_the_colour_of_a_label_does_not_depend_on_case():
    assert label_color("Remote Control") == label_color("remote control ")
    # The values are fixed, so that labels keep the colours of images already shared.
    assert [label_color(label) for label in ("cat", "person", "cup")] == [(109, 12, 228), (40, 244, 37), (12, 181, 228)]


def test_many_labels_have_different_colours():
    labels = ["person", "bicycle", "car", "dog", "cat", "chair", "table", "cup", "bottle", "book", "phone", "hat"]
    assert len({label_color(label) for label in labels}) == len(labels)


@pytest.mark.parametrize(
    ("background", "text"),
    [
        ((255, 255, 255), (0, 0, 0)),
        ((0, 0, 0), (255, 255, 255)),
        ((255, 255, 0), (0, 0, 0)),
        ((0, 0, 255), (255, 255, 255)),
        # At a luminance of 0.179 both contrasts are equal, 4.58.
        ((117, 117, 117), (255, 255, 255)),
        ((119, 119, 119), (0, 0, 0)),
    ],
)
def test_text_has_the_colour_with_the_higher_contrast(background, text):
    assert text_color(background) == text


def test_the_most_confident_box_is_on_top():
    low, high = ("cat", 0.4, [20, 40, 80, 100]), ("dog", 0.8, [20, 40, 80, 100])
    for found in ((low, high), (high, low)):
        drawn = draw_detections(grey(200, 150), result(*found), line_width=3)
        assert rows_of(drawn, label_color("dog"))[70, 20:23].all()


def test_labels_do_not_cover_each_other():
    found = [("cat", 0.9, [20, 60, 180, 140]), ("dog", 0.8, [20, 60, 180, 140]), ("cup", 0.7, [20, 60, 180, 140])]
    together = draw_detections(grey(200, 150), result(*found), font_size=12)
    for label, score, box in found:
        # The chip's colour is as visible as when the box is drawn alone, apart from the box's lines.
        chip = rows_of(together, label_color(label)).sum()
        line = rows_of(draw_detections(grey(200, 150), result((label, score, box)), font_size=12), label_color(label))
        assert chip >= line.sum() - 2 * 2 * (160 + 80)


@pytest.mark.parametrize("box", [[-50, -50, 30, 30], [150, 120, 400, 400], [-10, -10, 300, 300], [300, 10, 310, 20]])
def test_boxes_beyond_the_image_are_drawn_at_its_border(box):
    drawn = draw_detections(grey(200, 150), result(("cat", 0.9, box)))
    assert drawn.size == (200, 150)
    assert rows_of(drawn, label_color("cat")).any()


@pytest.mark.parametrize(
    ("box", "as_if"),
    [
        ([-INFINITY, 60, 120, INFINITY], [0, 60, 120, 150]),
        ([50, -INFINITY, INFINITY, 110], [50, 0, 200, 110]),
        ([-INFINITY, -INFINITY, INFINITY, INFINITY], [0, 0, 200, 150]),
    ],
)
def test_infinite_coordinates_are_the_borders(box, as_if):
    drawn, expected = (draw_detections(grey(200, 150), result(("cat", 0.9, each))) for each in (box, as_if))
    assert np.array_equal(drawn, expected)


def test_a_box_with_a_nan_coordinate_is_left_out():
    nowhere, somewhere = ("cat", 0.9, [10, float("nan"), 60, 50]), ("dog", 0.8, [10, 30, 60, 50])
    drawn = draw_detections(grey(80, 60), result(nowhere, somewhere))
    assert np.array_equal(drawn, draw_detections(grey(80, 60), result(somewhere)))


def test_overlapping_boxes_tint_once_with_the_most_confident_colour():
    found = [("dog", 0.4 + 0.01 * number, [10, 20, 190, 140]) for number in range(40)]
    found += [("cat", 0.9, [100, 20, 190, 140]), ("cup", 0.3, [60, 60, 150, 130])]
    drawn = np.asarray(draw_detections(grey(200, 150), result(*found), line_width=1, font_size=8)).astype(int)
    for place, label in (((135, 50), "dog"), ((135, 130), "cat")):
        tinted = [128 * (1 - TINT) + channel * TINT for channel in label_color(label)]
        assert np.abs(drawn[place] - tinted).max() <= 1


def test_many_large_boxes_take_hardly_longer_than_one():
    """If every box were blended separately on 12 megapixels, 60 boxes would take about 30 times as long as one."""
    rng = np.random.default_rng(0)
    picture = grey(4000, 3000)
    corners = [[*rng.uniform(0, 700, 2), *rng.uniform(2300, 3000, 2)] for _ in range(60)]

    def seconds(boxes):
        found = result(*[("cat", 0.5, box) for box in boxes])
        times = []
        for _ in range(3):
            begin = time.process_time()
            draw_detections(picture, found)
            times.append(time.process_time() - begin)
        return min(times)

    draw_detections(picture, result(("cat", 0.5, corners[0])))
    # The factor allows for drawing 60 lines and labels; a busy machine slows down both sides.
    assert seconds(corners) < 8 * seconds(corners[:1])


@pytest.mark.parametrize("size", [(1, 1), (10_000, 8), (8, 3000), (3, 3)])
def test_images_of_odd_sizes_keep_their_size(size):
    drawn = draw_detections(grey(*size), result(("a rather long label", 0.9, [0, 0, *size])))
    assert drawn.size == size
    assert not (np.asarray(drawn) == 128).all()


def test_a_very_narrow_image_is_not_covered_by_its_label():
    drawn = draw_detections(grey(10_000, 8), result(("cat", 0.9, [5000, 0, 5600, 8])))
    assert (np.asarray(drawn)[:, 6000:] == 128).all()
    assert (np.asarray(drawn)[:, :4900] == 128).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    picture = Image.new(mode, (80, 60)) if mode == "I;16" else grey(80, 60).convert(mode)
    drawn = draw_detections(picture, result(("cat", 0.9, [10, 30, 60, 50])))
    assert (drawn.mode, drawn.size) == ("RGB", (80, 60))
    assert rows_of(drawn, label_color("cat")).any()


def test_an_image_rotated_by_exif_is_drawn_upright():
    picture = grey(60, 100)
    picture.getexif()[0x0112] = 6
    drawn = draw_detections(picture, result(("cat", 0.9, [70, 20, 95, 50])), line_width=2)
    assert drawn.size == (100, 60)
    assert rows_of(drawn, label_color("cat"))[21:51, 70].all()


def test_pipeline_results_are_drawn_like_processor_results():
    found = [("cat", 0.9, [10, 30, 60, 50]), ("dog", 0.5, [20, 40, 70, 55])]
    sides = ("xmin", "ymin", "xmax", "ymax")
    piped = [{"label": x, "score": score, "box": dict(zip(sides, box, strict=True))} for x, score, box in found]
    assert np.array_equal(draw_detections(grey(80, 60), piped), draw_detections(grey(80, 60), result(*found)))


def test_scores_can_be_left_out():
    found = result(("cat", 0.9, [10, 30, 60, 50]))
    chip = [
        rows_of(draw_detections(grey(120, 60), found, show_scores=shown), label_color("cat"))[:28].sum()
        for shown in (True, False)
    ]
    assert chip[0] > chip[1] > 0


@pytest.mark.parametrize("label", ["кошка", "猫", "🐈", "Käse", "two\nlines", "x" * 1000])
def test_labels_of_any_script_and_length_are_drawn(label):
    drawn = draw_detections(grey(120, 60), result((label, 0.9, [10, 30, 60, 50])))
    assert rows_of(drawn, label_color(label)).any()


def test_different_numbers_of_boxes_scores_and_labels_are_rejected():
    broken = {**result(("cat", 0.9, [1, 2, 3, 4])), "scores": [0.9, 0.8]}
    with pytest.raises(ValueError, match="1 boxes, 2 scores and 1 labels"):
        draw_detections(grey(20, 20), broken)
