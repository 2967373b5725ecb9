"""Options of the image processor that transformers' own has: layouts, sizes, devices, annotations, addresses."""

from __future__ import annotations

import base64
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from gdino_hf import GDinoImageProcessor
from gdino_hf.model.picture_pixels import load_image
from gdino_hf.model.pixel_layouts import checked_device
from gdino_hf.model.remote_pictures import downloaded

SMALL = {"shortest_edge": 64, "longest_edge": 96}
# The same operations in float32, in another order.
ROUNDING = 1e-5


def pixels(height=40, width=50, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def small():
    return GDinoImageProcessor(size=SMALL)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["array", "tensor"])
@pytest.mark.parametrize("shape", [(3, 5, 3), (4, 6, 3), (1, 3, 3), (3, 3, 3)])
def test_input_data_format_says_where_channels_are(make, shape, small):
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    expected = small(Image.fromarray(image))["pixel_values"]
    for axis in ("channels_last", ChannelDimension.LAST):
        assert torch.equal(small(make(image), input_data_format=axis)["pixel_values"], expected)
    first = np.ascontiguousarray(image.transpose(2, 0, 1))
    for axis in ("channels_first", ChannelDimension.FIRST):
        assert torch.equal(small(make(first), input_data_format=axis)["pixel_values"], expected)


def test_input_data_format_that_does_not_fit_is_refused(small):
    with pytest.raises(ValueError, match="input_data_format must be 'channels_first', 'channels_last', 'none'"):
        small(pixels(), input_data_format="last")
    with pytest.raises(ValueError, match=r"is 'none' but an image has the shape \(40, 50, 3\); give 2 axes"):
        small(pixels(), input_data_format="none")
    with pytest.raises(ValueError, match=r"puts 40 channels into an image of the shape \(40, 50, 3\)"):
        small(pixels(), input_data_format="channels_first")
    grey = small(pixels()[..., 0], input_data_format="none")["pixel_values"]
    assert torch.equal(grey, small(Image.fromarray(pixels()[..., 0]))["pixel_values"])


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_data_format_moves_the_channels_of_the_result(kind, small):
    images = [pixels(40, 50), pixels(60, 45, seed=1)]
    first = small(images, data_format="channels_first", return_tensors=kind)["pixel_values"]
    last = small(images, data_format="channels_last", return_tensors=kind)["pixel_values"]
    for one, other in zip(first, last, strict=True):
        assert np.array_equal(np.asarray(one).transpose(1, 2, 0), np.asarray(other))
    with pytest.raises(ValueError, match="data_format must be 'channels_first', 'channels_last', got 'none'"):
        small(images, data_format="none")


def test_device_moves_every_tensor(small):
    features = small(
        pixels(),
        device="meta",
        annotations={"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]},
    )
    values = [features[name] for name in ("pixel_values", "pixel_mask", "image_sizes")]
    assert {value.device.type for value in (*values, *features["labels"][0].values())} == {"meta"}
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used on this machine"):
        checked_device("cuda:99", "pt")
    with pytest.raises(ValueError, match="device 'gpu' is not a device of torch"):
        small(pixels(), device="gpu")
    with pytest.raises(ValueError, match="device 'meta' needs return_tensors='pt', got 'np'"):
        small(pixels(), device="meta", return_tensors="np")


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (42, {}, (42, 84)),
        (42, {"max_size": 60}, (30, 60)),
        (42, {"max_size": 1000}, (42, 84)),
        ({"longest_edge": 100}, {}, (50, 100)),
        ({"longest_edge": 49}, {}, (24, 49)),
        ({"shortest_edge": 30}, {"max_size": 50}, (25, 50)),
        (np.int64(42), {}, (42, 84)),
    ],
)
def test_sizes_as_a_number_or_one_edge(size, options, expected):
    image = pixels(200, 400)
    by_call = GDinoImageProcessor()(image, size=size, **options)
    by_constructor = GDinoImageProcessor(size=size, **options)
    assert by_call["image_sizes"].tolist() == [list(expected)]
    assert torch.equal(by_constructor(image)["pixel_values"], by_call["pixel_values"])
    loaded = GDinoImageProcessor.from_dict(by_constructor.to_dict())
    assert loaded.size == by_constructor.size


def test_legacy_options_equal_transformers():
    given = {"size": 42, "max_size": 84, "pad_and_return_pixel_mask": False}
    ours, theirs = GDinoImageProcessor(**given), GroundingDinoImageProcessorPil(**given)
    assert ours.size == dict(theirs.size) == {"shortest_edge": 42, "longest_edge": 84}
    assert ours.do_pad is theirs.do_pad is False
    assert GDinoImageProcessor()(pixels(40, 400), max_size=100)["image_sizes"].tolist() == [[10, 100]]


def test_sizes_of_transformers_own_processor_are_read():
    theirs = GroundingDinoImageProcessorPil(size=SMALL, pad_size={"height": 100, "width": 120})
    ours = GDinoImageProcessor(size=theirs.size, pad_size=theirs.pad_size)
    assert (ours.size, ours.pad_size) == (SMALL, {"height": 100, "width": 120})
    assert ours(pixels())["pixel_values"].shape == (1, 3, 100, 120)
    assert GDinoImageProcessor()(pixels(), size=theirs.size)["image_sizes"].tolist() == [[64, 80]]
    for pad_size in (100, {"height": 100}, {"height": 0, "width": 9}):
        with pytest.raises(ValueError, match="pad_size must be"):
            GDinoImageProcessor(pad_size=pad_size)


def test_sizes_that_contradict_are_refused():
    with pytest.raises(ValueError, match="contradict each other"):
        GDinoImageProcessor(size=SMALL, max_size=100)
    with pytest.raises(ValueError, match="contradict each other"):
        GDinoImageProcessor()(pixels(), size=SMALL, max_size=100)


def test_nested_lists_are_one_batch(small):
    images = [pixels(40, 50), pixels(40, 50, seed=1), pixels(40, 50, seed=2)]
    flat = small(images)["pixel_values"]
    assert torch.equal(small([[images[0]], images[1:]])["pixel_values"], flat)
    assert torch.equal(small([np.stack(images)])["pixel_values"], flat)
    assert torch.equal(small([[image] for image in images])["pixel_values"], flat)


ITEMS = [
    {"bbox": [4, 6, 20, 16], "category_id": 3, "area": 200, "iscrowd": 0},
    {"bbox": [0, 0, 50, 40], "category_id": 1, "area": 2000, "iscrowd": 1},
    {"bbox": [30, 10, 90, 10], "category_id": 2, "area": 150, "iscrowd": 0},
    {"bbox": [5, 5, 0, 10], "category_id": 2, "area": 0, "iscrowd": 0},
]


@pytest.mark.parametrize("relative", [True, False])
def test_labels_have_the_fields_of_transformers(relative, small):
    annotation = {"image_id": 39769, "annotations": ITEMS}
    given = {"annotations": annotation, "do_convert_annotations": relative, "return_tensors": "pt"}
    (ours,) = small(pixels(), **given)["labels"]
    (theirs,) = GroundingDinoImageProcessorPil(size=SMALL)(images=pixels(), **given)["labels"]
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(
            ours[name], value, rtol=ROUNDING, atol=ROUNDING, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_labels_without_area_or_id(small):
    items = [{"bbox": [4, 6, 20, 16], "category_id": 3}, {"bbox": [4, 6, 20, 16], "category_id": 3, "area": None}]
    (label,) = small(pixels(), annotations={"annotations": items, "image_id": "a.jpg"})["labels"]
    assert "image_id" not in label
    assert label["size"].tolist() == [64, 80]
    assert label["orig_size"].tolist() == [40, 50]
    # The area of the box, grown with the picture by 1.6 a side.
    torch.testing.assert_close(label["area"], torch.full((2,), 20 * 16 * 1.6**2))
    (empty,) = small(pixels(), annotations={"annotations": []})["labels"]
    assert (empty["boxes"].shape, empty["area"].shape, empty["iscrowd"].shape) == ((0, 4), (0,), (0,))


def test_channels_are_kept_on_demand(small):
    image = pixels(channels=4)
    given = {"do_convert_rgb": False, "image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    kept = small(image, input_data_format="channels_last", **given)["pixel_values"]
    assert kept.shape == (1, 4, 64, 80)
    rgb = small(image[..., :3], do_normalize=False)["pixel_values"]
    assert torch.equal(kept[:, :3], rgb)
    assert torch.equal(small(Image.fromarray(image, "RGBA"), **given)["pixel_values"], kept)
    assert small(image)["pixel_values"].shape == (1, 3, 64, 80)
    with pytest.raises(ValueError, match="image_mean has 3 numbers for pictures of 4 channels"):
        small(image, do_convert_rgb=False)
    with pytest.raises(ValueError, match="Pictures of 3 and 4 channels do not stack"):
        small([image, image[..., :3]], do_convert_rgb=False, do_normalize=False)


@pytest.mark.parametrize("std", [0, [0.2, 0, 0.2], [0.2, 1e-50, 0.2], [1e-42] * 3, [float("nan")] * 3])
def test_a_std_to_divide_by_is_finite_and_not_zero(std):
    reason = "pixels are divided by it|give one finite number"
    with pytest.raises(ValueError, match=reason):
        GDinoImageProcessor(image_std=std)
    with pytest.raises(ValueError, match=reason):
        GDinoImageProcessor()(pixels(), image_std=std)


def test_panoptic_annotations_are_refused(small):
    with pytest.raises(ValueError, match="format must be 'coco_detection', got 'coco_panoptic'"):
        small(pixels(), format="coco_panoptic")


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/picture.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.server.content if found else b"")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """The address of a server on this machine that has one picture."""
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "PNG")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.content = file.getvalue()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_addresses_and_base64_are_pictures(address, small):
    expected = small(pixels())["pixel_values"]
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    for image in (f"{address}/picture.png", f"HTTP{address[4:]}/picture.png", text, f"data:image/png;base64,{text}"):
        assert torch.equal(small(image)["pixel_values"], expected)
    batch = small([f"{address}/picture.png", pixels()])["pixel_values"]
    assert torch.equal(batch, torch.cat((expected, expected)))


def test_addresses_that_fail_are_named(address, small):
    with pytest.raises(ValueError, match=r"/none\.png cannot be read \(HTTP Error 404"):
        small(f"{address}/none.png")
    with pytest.raises(ValueError, match="is not in base64"):
        small("data:image/svg+xml,<svg/>")
    with pytest.raises(ValueError, match="holds no base64"):
        small("data:image/png;base64,%%%")


def test_unreachable_addresses_are_one_sentence_with_host_reason_and_remedy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    causes = {
        "http://127.0.0.1:9/a.png": r"127\.0\.0\.1 cannot be asked: Connection refused\); check the address",
        "http://no-such-host.invalid/a.png": r"the host no-such-host\.invalid is not found: .+\); check its name",
        f"http://127.0.0.1:{port}/a.png": r"127\.0\.0\.1 does not answer within 0\.2 seconds\); try later",
        f"https://127.0.0.1:{port}/a.png": r"127\.0\.0\.1 does not answer within 0\.2 seconds\); try later",
        "http://[::1/a.png": r"names no host that can be asked\); give an address like",
        "http://:80/a.png": r"names no host that can be asked\); give an address like",
        "http://127.0.0.1:99999/a.png": r"127\.0\.0\.1 cannot be asked: .+\); check the address",
        "http://127.0.0.1:9/a b.png": r"127\.0\.0\.1 cannot be asked: .+\); check the address",
        f"http://{'x' * 70}.invalid/a.png": r"x is not found|cannot be asked",
    }
    for address, cause in causes.items():
        with pytest.raises(ValueError, match=cause) as caught:
            downloaded(address, timeout=0.2)
        message = str(caught.value)
        assert message.startswith(f"{address} cannot be read (")
        assert message.endswith(".")
        assert "urlopen" not in message
        assert "\n" not in message
        assert "Errno" not in message
    silent.close()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_was_read_is_not_turned_again(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels(24, 40)).save(file, kind, exif=exif)
    once = load_image(file.getvalue())
    assert np.array_equal(np.asarray(load_image(once)), np.asarray(once))


@pytest.mark.parametrize("factor", [0, 0.0, 1e-50, float("nan"), float("inf"), "1/255", None, True])
def test_rescale_factors_that_lose_the_picture_are_refused(factor, small):
    with pytest.raises(ValueError, match=r"rescale_factor is .*; give"):
        GDinoImageProcessor(rescale_factor=factor)
    if factor is not None:
        with pytest.raises(ValueError, match=r"rescale_factor is .*; give"):
            small(pixels(), rescale_factor=factor)


def test_a_factor_that_inverts_pictures_is_followed_and_said_once(small, caplog):
    """transformers' own tests of processors use such a factor."""
    plain = small(pixels(), rescale_factor=1 / 200, do_normalize=False)["pixel_values"]
    for _ in range(2):
        inverted = small(pixels(), rescale_factor=-1 / 200, do_normalize=False)["pixel_values"]
    assert torch.equal(inverted, -plain)
    assert caplog.text.count("rescale_factor is -0.005, which inverts pictures") == 1


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 10**9, "longest_edge": 10**9},
        {"shortest_edge": 30_000},
        {"longest_edge": 40_000},
        {"height": 10_000, "width": 9_000},
        {"max_height": 10**6, "max_width": 10**6},
    ],
)
def test_sizes_beyond_the_limit_of_pixels_are_refused_before_memory_is_taken(size, small, monkeypatch):
    with pytest.raises(ValueError, match=r"size .* makes a picture of \d+ x \d+ pixels, and 80 million are allowed"):
        small(pixels(), size=size)
    monkeypatch.setenv("GDINO_MAX_MEGAPIXELS", "0.004")
    with pytest.raises(ValueError, match=r"pad_size .* makes a picture of 80 x 60 pixels, and 0.004 million"):
        small(pixels(), pad_size={"height": 60, "width": 80})


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"image_std": [0.2, -0.2, 0.2]}, r"image_std is \[0.2, -0.2, 0.2\]; .*give numbers from 1e-06 to 1e\+06"),
        ({"image_std": [1e-9] * 3}, "give numbers from 1e-06"),
        ({"image_std": 1e30}, r"to 1e\+06"),
        ({"image_mean": [1e38, 0, 0]}, r"image_mean is .*; give the mean of the pixels, at most 1e\+06"),
        ({"rescale_factor": 1e30}, "with which a model sees nothing; give 1 / 255"),
        ({"rescale_factor": -1e-9}, "with which a model sees nothing; give 1 / 255"),
        ({"resample": 99}, r"resample is 99; give one of Pillow's filters \[0, 1, 2, 3, 4, 5"),
        ({"resample": "bilinear"}, "resample is 'bilinear'; give one of"),
        ({"size": {"shortest_edge": float("nan")}}, "size must be positive shortest_edge"),
        ({"size": {"height": "x", "width": 3}}, "size must be positive shortest_edge"),
    ],
)
def test_options_with_which_a_model_would_see_nothing_are_refused(option, words, small):
    with pytest.raises(ValueError, match=words):
        GDinoImageProcessor(**option)
    with pytest.raises(ValueError, match=words):
        small(pixels(), **option)
