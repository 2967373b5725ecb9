"""Masks on the page: the segmenter's own, in the picture, the downloads and videos; no menu without a segmenter."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from gdino_demo import masks as module
from gdino_demo.engine import Models
from gdino_demo.outputs import Settings
from gdino_demo.queries import read_query
from gdino_demo.safety import Refused, read_picture
from gradio_client import Client, handle_file
from PIL import Image

from gdino_hf import Detector
from gdino_hf.detection.coco_exchange import decode_masks
from gdino_hf.segmentation import Segmenter
from tiny_segmenters import save_segmenter
from video_clips import write_clip

pytest.importorskip("pycocotools")
pytest.importorskip("shapely")

# Boxes run in passes of several sizes, which may turn a pixel whose logit is next to zero.
ROUNDED_PIXELS = 1e-3
LOW, HIGH = Settings(0.05), Settings(0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_segmenter("sam2", tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def segmenter(folder):
    return Segmenter(folder, device="cpu")


@pytest.fixture(scope="module")
def models(segmenter):
    return Models({"nano": Detector("nano", device="cpu")}, {"sam": segmenter})


@pytest.fixture(scope="module")
def photograph(example_folder):
    return read_picture(example_folder / "cat.jpg", "cat.jpg")


@pytest.fixture(scope="module")
def masked_page(serve, segmenter):
    with serve({"sam": segmenter}) as page:
        yield page


@pytest.fixture(scope="module")
def masked_client(masked_page):
    return Client(masked_page.address, verbose=False)


def assert_like(masks, expected):
    assert masks.shape == expected.shape
    assert (masks != expected).mean() < ROUNDED_PIXELS


def test_masks_are_those_of_the_segmenter_whatever_was_shown_before(models, segmenter, photograph, monkeypatch):
    outputs = models.run("nano", photograph, read_query("cat, dog"), "sam")
    calls = []
    monkeypatch.setattr(segmenter, "features", lambda images: calls.append(images))
    high, low = outputs.detections(HIGH), outputs.detections(LOW)
    assert 0 < len(high) < len(low)
    again = outputs.detections(HIGH)
    assert np.array_equal(high.masks, again.masks)
    assert calls == [], "the picture was encoded again"
    monkeypatch.undo()
    assert_like(low.masks, segmenter(photograph.image, low).masks)
    assert 0 < low.masks.sum() < low.masks.size
    assert outputs.num_bytes > outputs.masks.num_bytes > 32 * 16 * 16 * 4
    assert models.run("nano", photograph, read_query("cat, dog")).detections(HIGH).masks is None


def test_boxes_are_tightened_by_choice(folder, photograph):
    tight = Models({"nano": Detector("nano", device="cpu")}, {"sam": Segmenter(folder, device="cpu", tighten=True)})
    found = tight.run("nano", photograph, read_query("cat"), "sam").detections(HIGH)
    assert np.array_equal(found.boxes, found.tightened().boxes)


def test_more_masks_than_fit_into_memory_are_refused(models, photograph, monkeypatch):
    outputs = models.run("nano", photograph, read_query("cat, dog"), "sam")
    width, height = photograph.image.size
    number = len(outputs.detections(LOW))
    monkeypatch.setattr(module, "MOST_MASK_BYTES", (number - 1) * width * height)
    with pytest.raises(
        Refused, match=f"{number} boxes in a picture of {width}x{height} pixels have too many masks; at"
    ):
        outputs.detections(LOW)
    assert len(outputs.detections(HIGH)) > 0
    with pytest.raises(Refused, match="no masks of this name here; choose one of off, sam"):
        models.run("nano", photograph, read_query("cat"), "sam3")


@pytest.mark.parametrize("name", ["detect", "ground"])
def test_endpoints_return_masks(masked_client, segmenter, example_folder, photograph, name):
    asked = {"labels": "cat"} if name == "detect" else {"caption": "a cat"}
    picture = handle_file(example_folder / "cat.jpg")
    found = masked_client.predict(image=picture, **asked, masks="sam", api_name=f"/{name}")
    assert (found["masks"], found["tighten"]) == ("sam", False)
    masks = decode_masks([each["mask"] for each in found["detections"]], photograph.image.size)
    assert len(masks) >= 1
    features = segmenter.features([photograph.image])[0]
    assert_like(masks, segmenter.masks(features, np.array([each["box"] for each in found["detections"]])))
    without = masked_client.predict(image=picture, **asked, api_name=f"/{name}")
    assert "masks" not in without
    assert all("mask" not in each for each in without["detections"])


def test_a_batch_has_the_masks_of_every_picture(masked_client, segmenter, example_folder):
    files = [example_folder / name for name in ("cat.jpg", "cup.jpg")]
    asked = {"files": [handle_file(file) for file in files], "labels": "cat, cup", "threshold": 0.15}
    found = masked_client.predict(**asked, masks="sam", api_name="/batch")
    plain = masked_client.predict(**asked, api_name="/batch")
    assert [each["bbox"] for each in found["annotations"]] == [each["bbox"] for each in plain["annotations"]]
    assert {each["image_id"] for each in found["annotations"]} == {1, 2}
    assert not any(isinstance(each["segmentation"], dict) for each in plain["annotations"])
    for number, file in enumerate(files, start=1):
        picture = read_picture(file).image
        own = [each for each in found["annotations"] if each["image_id"] == number]
        corners = np.array([each["bbox"] for each in own])
        corners[:, 2:] += corners[:, :2]
        expected = segmenter.masks(segmenter.features([picture])[0], corners)
        assert_like(decode_masks([each["segmentation"] for each in own], picture.size), expected)


def test_the_video_has_masks_where_the_model_looked(masked_client, segmenter, example_folder, tmp_path):
    with Image.open(example_folder / "cat.jpg") as cat:
        path = write_clip(tmp_path / "cat.mp4", [cat.resize((240, 160))] * 5)
    found = masked_client.predict(video=handle_file(path), labels="cat", stride=2, masks="sam", api_name="/video")
    assert found["masks"] == "sam"
    kinds = [{"mask" in each for each in frame["detections"]} for frame in found["frames"]]
    assert kinds == [set(), set(), {True}, {False}, {True}]
    (mask,) = decode_masks([found["frames"][2]["detections"][0]["mask"]], (240, 160))
    assert 0 < mask.sum() < mask.size


def test_without_a_segmenter_nothing_asks_for_masks(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    names = {each["parameter_name"] for endpoint in endpoints.values() for each in endpoint["parameters"]}
    assert "masks" not in names


def test_a_visitor_chooses_masks_and_downloads_them(masked_page, page, browser, example_folder, artifacts, tmp_path):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.goto(page.address)
    tab.wait_for_selector("#gd-detect")
    assert tab.locator(".gd-masks-field").count() == 0
    tab.goto(masked_page.address)
    tab.wait_for_selector("#gd-detect")
    tab.click("#gd-more button")
    tab.click(".gd-masks-field input >> visible=true")
    tab.get_by_role("option", name="sam", exact=True).click()
    tab.set_input_files("#gd-picture input[type=file]", str(example_folder / "cat.jpg"))
    tab.wait_for_selector("#gd-picture img")
    tab.get_by_role("textbox", name=re.compile("^Labels ")).fill("cat")
    tab.click("#gd-detect")
    layer = tab.locator("#gd-figure img.gd-masks")
    layer.wait_for()
    assert "masks by sam" in tab.inner_text("#gd-status")
    tab.screenshot(path=artifacts / "masks.png", full_page=True)

    def download(selector):
        with tab.expect_download() as waiting:
            tab.click(selector)
        waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
        return tmp_path / waiting.value.suggested_filename

    saved = json.loads(download("#gd-json").read_text(encoding="utf-8"))
    size = (saved["width"], saved["height"])
    (mask,) = decode_masks([each["mask"] for each in saved["detections"]], size)
    alpha = tab.evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const drawing = canvas.getContext("2d");
            drawing.drawImage(image, 0, 0);
            return [...drawing.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3)];
        }""",
        layer.element_handle(),
    )
    assert np.array_equal(np.array(alpha).reshape(mask.shape) > 0, mask)
    tab.click("#gd-format input")
    tab.get_by_role("option", name="png", exact=True).click()
    with zipfile.ZipFile(download("#gd-download")) as archive:
        numbers = Image.open(io.BytesIO(archive.read("masks/objects/cat.png")))
        assert np.array_equal(np.asarray(numbers) > 0, mask)
    drawn = np.asarray(Image.open(download("#gd-png")).convert("RGB"), dtype=float)
    with Image.open(example_folder / "cat.jpg") as cat:
        changed = np.abs(drawn - np.asarray(cat.convert("RGB"), dtype=float)).max(-1) > 0
    assert changed[mask].mean() > 0.9 > changed[~mask].mean()
    context.close()
