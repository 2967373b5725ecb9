"""Pictures of every kind to tensors, annotations to boxes, and broken files to clear errors."""

from __future__ import annotations

import io
import json
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from gdino_hf.model.image_processing_gdino import GDinoImageProcessor, boxes_from_coco, load_image

# The same operations in float32, in another order.
ROUNDING = 1e-5


def pixels(height=40, width=50, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height=40, width=50):
    """A picture that lossy formats keep within a few values."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([4 * x, 5 * y, 2 * x + 2 * y], axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small():
    return GDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (640, 480), (1, 1), (1000, 300), (801, 1333), (800, 1333), (37, 900), (600, 600), (10, 4000)],
)
def test_equals_transformers(height, width):
    image = Image.fromarray(pixels(height, width))
    ours, theirs = GDinoImageProcessor()(image), GroundingDinoImageProcessorPil()(images=image, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=ROUNDING)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])


def test_padded_batch_equals_transformers():
    images = [Image.fromarray(pixels(60, 80)), Image.fromarray(pixels(90, 50, seed=1))]
    size = {"shortest_edge": 64, "longest_edge": 96}
    ours = GDinoImageProcessor(size=size)(images)
    theirs = GroundingDinoImageProcessorPil(size=size)(images=images, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=ROUNDING)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])
    assert ours["image_sizes"].tolist() == [[64, 85], [96, 53]]
    assert ours.original_sizes == [(60, 80), (90, 50)]


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 32, "width": 48}},
        {"size": {"max_height": 40, "max_width": 30}},
        {"resample": 3},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
        {"pad_size": {"height": 100, "width": 120}},
    ],
    ids=str,
)
def test_options_equal_transformers(options):
    image = Image.fromarray(pixels(60, 80))
    options = {"size": {"shortest_edge": 64, "longest_edge": 96}, **options}
    theirs = GroundingDinoImageProcessorPil(**options)(images=image, return_tensors="pt")
    for ours in (GDinoImageProcessor(**options)(image), GDinoImageProcessor()(image, **options)):
        # Without rescaling values reach 255.
        atol = ROUNDING if options.get("do_rescale", True) else 255 * ROUNDING
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"].float(), rtol=0, atol=atol)
        assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])


def test_fixed_size_pads_nothing():
    batch = GDinoImageProcessor(size={"height": 32, "width": 32})([Image.fromarray(pixels(9, 70)), pixels(40, 8)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_mask"].all()


def test_hub_preprocessor_config_is_read(tmp_path):
    hub = {
        "do_convert_annotations": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GroundingDinoImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "GroundingDinoProcessor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1333, "shortest_edge": 800},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub))
    processor = GDinoImageProcessor.from_pretrained(tmp_path)
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    image = Image.fromarray(pixels(60, 80))
    assert torch.equal(processor(image)["pixel_values"], GDinoImageProcessor()(image)["pixel_values"])
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "GDinoImageProcessor"
    assert GDinoImageProcessor.from_pretrained(tmp_path / "saved").to_dict() == processor.to_dict()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats_are_read_from_path_bytes_and_file(kind, tmp_path):
    data = encoded(Image.fromarray(smooth()), kind, **({"quality": 95} if kind != "PNG" else {}))
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data), Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        # A lossless file gives the very values; lossy ones a few apart.
        assert np.abs(np.asarray(image).astype(int) - smooth()).mean() <= (0 if kind == "PNG" else 4)


def test_modes_show_the_same_colour():
    colour = (200, 100, 50)
    flat = Image.new("RGB", (8, 6), colour)
    palette = flat.quantize(4)
    transparent = Image.new("RGBA", (8, 6), (*colour, 0))
    for image in (flat, palette, transparent, flat.convert("RGBA"), flat.convert("RGBX"), palette.convert("PA")):
        assert load_image(image).getpixel((3, 3)) == colour, image.mode
    # These colour spaces round.
    for mode in ("CMYK", "YCbCr", "HSV"):
        assert np.abs(np.subtract(load_image(flat.convert(mode)).getpixel((3, 3)), colour)).max() <= 3, mode


def test_cmyk_jpeg_and_transparent_palette_png_are_read():
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    cmyk = load_image(encoded(flat.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.subtract(cmyk.getpixel((8, 8)), (200, 100, 50))).max() <= 4
    palette = flat.quantize(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(encoded(palette, "PNG", transparency=b"\x00\x80"))
    assert image.getpixel((8, 8)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("L", (4, 4), 77), 77),
        (Image.new("LA", (4, 4), (77, 0)), 77),
        (Image.new("1", (4, 4), 1), 255),
        (Image.fromarray(np.full((4, 4), 77 * 257, dtype=np.uint16)), 77),
        (Image.fromarray(np.full((4, 4), 77, dtype=np.uint16)), 77),
        (Image.fromarray(np.full((4, 4), 77 * 257, dtype=np.int32)), 77),
        (Image.fromarray(np.full((4, 4), 77, dtype=np.int32)), 77),
        (Image.fromarray(np.full((4, 4), 77.0, dtype=np.float32)), 77),
    ],
    ids=["grey", "grey-alpha", "bits", "16-bit", "8-of-16-bit", "32-bit-wide", "32-bit-bytes", "float"],
)
def test_grey_of_any_depth_keeps_its_brightness(image, value):
    assert np.asarray(load_image(image)).tolist() == np.full((4, 4, 3), value).tolist()


def test_sixteen_bit_png_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = np.asarray(load_image(encoded(Image.fromarray(ramp), "PNG")))
    np.testing.assert_array_equal(image[..., 0], np.rint(ramp / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_honoured(orientation, kind):
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(smooth(24, 40))
    stored = upright if turns[orientation] is None else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"quality": 95} if kind != "PNG" else {}))
    for image in (load_image(data), load_image(Image.open(io.BytesIO(data)))):
        assert image.size == (40, 24)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() <= 4
    assert GDinoImageProcessor()(data).original_sizes == [(24, 40)]


def test_callers_picture_is_left_as_it_was():
    image = Image.fromarray(smooth())
    image.getexif()[0x0112] = 6
    load_image(image)
    assert image.size == (50, 40)
    assert image.getexif()[0x0112] == 6


def test_arrays_and_tensors_equal_the_picture(small):
    array = pixels(30, 44)
    expected = small(Image.fromarray(array))["pixel_values"]
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    for image in (
        array,
        torch.from_numpy(array),
        channels_first,
        array.astype(np.int64),
        array.astype(np.float64),
        array.astype(np.float32) / 255,
        channels_first.float() / 255,
        channels_first.double() / 255,
        array.astype(np.uint16) * 257,
        np.dstack([array, np.zeros((30, 44), dtype=np.uint8)]),
    ):
        assert torch.equal(small(image)["pixel_values"], expected)
    # bfloat16 holds 8 bits of a pixel's value.
    half = small((channels_first.float() / 255).bfloat16())["pixel_values"]
    assert (half - expected).abs().mean() < 0.02
    grey = pixels(30, 44, 1)
    for image in (grey, grey[..., 0], torch.from_numpy(grey[..., 0]), grey.transpose(2, 0, 1)):
        assert torch.equal(small(image)["pixel_values"], small(Image.fromarray(grey[..., 0]))["pixel_values"])


def test_a_batch_array_is_its_images(small):
    batch = np.stack([pixels(seed=1), pixels(seed=2)])
    expected = small([Image.fromarray(image) for image in batch])["pixel_values"]
    assert torch.equal(small(batch)["pixel_values"], expected)
    assert torch.equal(small(torch.from_numpy(batch).permute(0, 3, 1, 2))["pixel_values"], expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10_000, 8), (1, 1333)), ((8, 10_000), (1333, 1)), ((50_000, 1), (1, 1333)), ((1, 1), (800, 800))],
)
def test_extreme_shapes_keep_at_least_one_pixel(size, expected):
    batch = GDinoImageProcessor()(Image.new("RGB", size, (255, 0, 0)))
    assert batch["pixel_values"].shape == (1, 3, *expected)
    assert batch["pixel_values"].isfinite().all()


def test_empty_file_truncated_jpeg_and_text_are_named(tmp_path, small):
    jpeg = encoded(Image.fromarray(pixels(200, 200)), "JPEG")
    files = {"empty.jpg": b"", "truncated.jpg": jpeg[: len(jpeg) // 2], "text.jpg": b"just words\n" * 10}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            small(tmp_path / name)
        with pytest.raises(ValueError):
            small(data)
    with pytest.raises(ValueError, match=r"no file .*absent\.jpg"):
        small(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="is a folder; name a picture in it"):
        small(tmp_path)


def test_truncated_picture_opened_by_the_caller_is_refused(small):
    jpeg = encoded(Image.fromarray(pixels(200, 200)), "JPEG")
    with pytest.raises(ValueError, match="cannot be decoded"):
        small(Image.open(io.BytesIO(jpeg[: len(jpeg) // 2])))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_bytes_give_a_picture_or_a_value_error(kind):
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels()), kind, **({} if kind == "GIF" else {"exif": exif}))
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(chance.choice([200, len(data)]))] = chance.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(bytes(damaged))
            except ValueError:
                continue
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan, dtype=np.float32), "not finite"),
        (torch.full((3, 4, 4), torch.inf), "not finite"),
        (Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "not finite"),
        (torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)), "undo the normalization"),
        (np.full((4, 4, 3), 70_000, dtype=np.int32), "0..65535"),
        (np.zeros((5, 5, 2), dtype=np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "must be"),
        (np.zeros(7, dtype=np.uint8), "must be"),
        (Image.new("RGB", (0, 5)), "at least one"),
        ([], "list of images is empty"),
    ],
)
def test_pixels_that_cannot_be_used_are_refused(image, message, small):
    with pytest.raises(ValueError, match=message):
        small(image)


@pytest.mark.parametrize("image", [3, None, {"path": "x"}, object()])
def test_other_types_are_refused(image, small):
    with pytest.raises(TypeError, match="An image must be"):
        small(image)


@pytest.mark.parametrize("size", [{}, {"height": 4}, {"shortest_edge": 0, "longest_edge": 4}, {"longest": 4}])
def test_sizes_that_cannot_be_used_are_refused(size):
    with pytest.raises(ValueError, match="size must be"):
        GDinoImageProcessor(size=size)
    with pytest.raises(ValueError, match="size must be"):
        GDinoImageProcessor()(pixels(), size=size)


def test_images_that_do_not_stack_or_fit_are_refused():
    images = [pixels(40, 50), pixels(50, 40)]
    with pytest.raises(ValueError, match="do_pad=True"):
        GDinoImageProcessor(do_pad=False, do_resize=False)(images)
    with pytest.raises(ValueError, match="smaller than an image"):
        GDinoImageProcessor(do_resize=False, pad_size={"height": 45, "width": 60})(images)
    with pytest.raises(ValueError, match=r"return_tensors must be 'pt', 'np' or None, got 'tf'"):
        GDinoImageProcessor()(images, return_tensors="tf")


def test_annotations_become_relative_clipped_boxes():
    annotation = {
        "image_id": 7,
        "annotations": [
            {"bbox": [10, 20, 30, 40], "category_id": 3},
            {"bbox": [-10, 50, 60, 100], "category_id": 1},
            {"bbox": [90, 10, 5, 0], "category_id": 2},
            {"bbox": [150, 10, 20, 20], "category_id": 2},
            {"bbox": [0, 0, 50, 50], "category_id": 2, "iscrowd": 1},
        ],
    }
    labels = boxes_from_coco(annotation, (80, 100))
    assert labels["class_labels"].tolist() == [3, 1]
    assert labels["class_labels"].dtype == torch.int64
    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.25, 0.5, 0.3, 0.5], [0.25, 0.8125, 0.5, 0.375]]))


def test_labels_equal_transformers_whatever_the_padding(small):
    images = [Image.fromarray(pixels(60, 80)), Image.fromarray(pixels(90, 50))]
    annotations = [
        {"image_id": 1, "annotations": [{"bbox": [5, 6, 20, 30], "category_id": 4, "area": 600}]},
        {"image_id": 2, "annotations": []},
    ]
    ours = small(images, annotations=annotations)["labels"]
    # One image a batch: with padding, transformers' boxes become relative to the padded frame.
    for image, annotation, label in zip(images, annotations, ours, strict=True):
        theirs = GroundingDinoImageProcessorPil(size=small.size)(
            images=image, annotations=annotation, return_tensors="pt"
        )["labels"][0]
        torch.testing.assert_close(label["boxes"], theirs["boxes"].float(), rtol=0, atol=1e-6)
        assert torch.equal(label["class_labels"], theirs["class_labels"])


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"image_id": 1}, "the list 'annotations'"),
        ([1], "the list 'annotations'"),
        ({"annotations": [{"bbox": [1, 2, -3, 4], "category_id": 0}]}, "negative width or height"),
        ({"annotations": [{"bbox": [1, 2, float("nan"), 4], "category_id": 0}]}, "four finite numbers"),
        ({"annotations": [{"bbox": [1, 2, 3], "category_id": 0}]}, "four finite numbers"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(annotation, message):
    with pytest.raises(ValueError, match=message):
        boxes_from_coco(annotation, (10, 10))


def test_numbers_of_images_and_annotations_must_agree(small):
    with pytest.raises(ValueError, match="2 annotations for 1 images"):
        small(pixels(), annotations=[{"annotations": []}] * 2)


def test_token_results_equal_transformers(small):
    class Outputs:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 5, 7, generator=generator)
        pred_boxes = torch.rand(2, 5, 4, generator=generator)

    ours = small.post_process_object_detection(Outputs, threshold=0.6, target_sizes=[(40, 50), (10, 20)])
    theirs = GroundingDinoImageProcessorPil().post_process_object_detection(
        Outputs, threshold=0.6, target_sizes=[(40, 50), (10, 20)]
    )
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("scores", "labels", "boxes"):
            torch.testing.assert_close(mine[name], other[name])
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        small.post_process_object_detection(Outputs, target_sizes=[(40, 50)])


@pytest.mark.parametrize("size", [[32, 48], "32", True, 32.5])
def test_a_size_without_names_is_refused(size):
    with pytest.raises(TypeError, match="size must be a dict"):
        GDinoImageProcessor(size=size)
    with pytest.raises(TypeError, match="size must be a dict"):
        GDinoImageProcessor()(Image.new("RGB", (8, 8)), size=size)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_floats_that_need_no_rescaling_equal_transformers(do_normalize):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.float32) / 255
    options = {
        "size": {"shortest_edge": 64, "longest_edge": 96},
        "do_rescale": False,
        "do_normalize": do_normalize,
        "return_tensors": "pt",
    }
    theirs = GroundingDinoImageProcessorPil()(pixels, **options)["pixel_values"]
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        ours = GDinoImageProcessor()(image, **options)["pixel_values"]
        # v / 255 in float32 here, in float64 there.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_bytes_without_rescaling_equal_transformers():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    options = {"size": {"shortest_edge": 64, "longest_edge": 96}, "do_rescale": False, "return_tensors": "pt"}
    ours, theirs = (
        p(pixels, **options)["pixel_values"] for p in (GDinoImageProcessor(), GroundingDinoImageProcessorPil())
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_grey_float_pictures_in_unit_range_equal_the_array():
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    picture, array = (np.asarray(load_image(image)) for image in (Image.fromarray(values), values))
    assert np.array_equal(picture, array)
    assert picture.max() == 255
    ours = GDinoImageProcessor(do_rescale=False, do_normalize=False)(Image.fromarray(values))["pixel_values"]
    assert 0.99 < ours.max() <= 1


def test_values_are_bit_equal_to_the_formula():
    image = pixels(64, 64)
    values = GDinoImageProcessor(do_resize=False)(Image.fromarray(image))["pixel_values"][0].numpy()
    mean, std = (np.array(numbers, dtype=np.float32) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (image.astype(np.float32) * np.float32(1 / 255) - mean) / std
    assert np.array_equal(values, expected.transpose(2, 0, 1))
