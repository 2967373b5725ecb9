"""The page in a real browser, in a window as wide as a desktop screen and as a phone."""

import contextlib
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from browser_checks import faint, fits
from gdino_hf import Detections
from gdino_hf.video.decoding import VideoFile
from gdino_hf.video.track_drawing import draw_tracks
from gdino_hf.video.tracked_frames import TrackedFrame
from video_clips import CODEC_ROUNDING, write_clip

DESK, PHONE = (1280, 900), (390, 844)
# Milliseconds; a page loads in two seconds on an idle core, but test workers share the cores.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def profiles(browser):
    """A browser profile for each size of window, which loads the page's files once for all tests."""
    made = {}
    for size, scheme in ((DESK, "light"), (PHONE, "dark")):
        viewport = dict(zip(("width", "height"), size, strict=True))
        made[size] = browser.new_context(viewport=viewport, color_scheme=scheme)
    yield made
    for profile in made.values():
        profile.close()


@contextlib.contextmanager
def window(page, profile):
    """Open the page in a new window; at the end, check that there was no error and no request to another server."""
    tab = profile.new_page()
    tab.set_default_timeout(PATIENCE)
    errors, abroad = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda asked: abroad.append(asked.url) if _is_abroad(asked.url) else None)
    tab.goto(page.address)
    tab.wait_for_selector("#gd-detect")
    tab.errors = errors
    yield tab
    tab.close()
    assert errors == []
    assert abroad == [], "the page asks other servers for something"


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def tab(request, page, profiles):
    with window(page, profiles[request.param]) as tab:
        yield tab


# What does not depend on the width.
only_desk = pytest.mark.parametrize("tab", [DESK], ids=["desk"], indirect=True)


def _is_abroad(url):
    return url.startswith("http") and "//127.0.0.1:" not in url and "//localhost:" not in url


def detect(tab, photograph, labels):
    tab.set_input_files("#gd-picture input[type=file]", str(photograph))
    tab.wait_for_selector("#gd-picture img")
    tab.fill("#gd-labels textarea, #gd-labels input", labels)
    tab.click("#gd-detect")


def count_boxes(tab, number):
    tab.wait_for_function(f"document.querySelectorAll('#gd-figure .gd-box').length === {number}")


def set_threshold(tab, value):
    field = tab.locator("#gd-threshold input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def download(tab, selector, folder):
    with tab.expect_download() as waiting:
        tab.click(selector)
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def presence(tab, prefix="gd"):
    """Return the presence table as label -> (highest score, found)."""
    rows = tab.locator(f"#{prefix}-presence tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return {label.strip(): (float(score), found.strip()) for label, score, found in cells}


def choose(tab, selector, name):
    """Choose a value of a menu."""
    tab.click(f"{selector} input")
    tab.get_by_role("option", name=name, exact=True).click()


def open_tab(tab, name):
    """Open a tab of the page, which a narrow screen moves into the menu behind the others."""
    button = tab.get_by_role("tab", name=name)
    if button.count() == 0:
        tab.locator(".overflow-menu > button").click()
        button = tab.locator(".overflow-dropdown button", has_text=name)
    button.click()


def test_a_visitor_detects_filters_and_downloads(tab, page, example_folder, artifacts, tmp_path):
    detect(tab, example_folder / "cat.jpg", "kitten, cat")
    count_boxes(tab, 1)
    width = tab.viewport_size["width"]
    tab.screenshot(path=artifacts / f"detect-{width}.png", full_page=True)
    seen = presence(tab)
    assert list(seen) == ["kitten", "cat"]
    # A cat that looks more like a kitten.
    assert (seen["kitten"][1], seen["cat"][1]) == ("1 box", "another label fits better")
    assert seen["kitten"][0] > seen["cat"][0] > 0.3
    assert tab.locator("#gd-figure .gd-box").get_attribute("aria-label").startswith("kitten 0.")
    status = tab.inner_text("#gd-status")
    assert "1 detection" in status
    assert "ms with nano on CPU, deformable attention in" in status

    forwards = page.models.forwards
    set_threshold(tab, 0.95)
    count_boxes(tab, 0)
    assert "lower the threshold from 0.95 to 0.7" in tab.inner_text("#gd-status")
    assert presence(tab) == {name: (score, "not found") for name, (score, _) in seen.items()}
    set_threshold(tab, 0)
    tab.wait_for_function("document.querySelectorAll('#gd-figure .gd-box').length > 1")
    shown = tab.locator("#gd-figure .gd-box").count()
    tab.get_by_label("cat", exact=True).uncheck()
    tab.wait_for_function("document.querySelector('#gd-presence').textContent.includes('hidden')")
    tab.wait_for_function("![...document.querySelectorAll('.gd-box')].some(b => b.title.startsWith('cat'))")
    assert presence(tab)["cat"] == (seen["cat"][0], "hidden")
    assert page.models.forwards == forwards, "moving a slider or a switch ran the model"

    saved = json.loads(download(tab, "#gd-json", tmp_path).read_text(encoding="utf-8"))
    assert {found["label"] for found in saved["detections"]} == {"kitten"}
    assert 1 <= len(saved["detections"]) <= shown
    assert saved["threshold"] == 0
    coco = json.loads(download(tab, "#gd-download", tmp_path).read_text(encoding="utf-8"))
    assert len(coco["annotations"]) == len(saved["detections"])
    choose(tab, "#gd-format", "yolo")
    with zipfile.ZipFile(download(tab, "#gd-download", tmp_path)) as archive:
        assert len(archive.read("yolo/labels/cat.txt").splitlines()) == len(saved["detections"])
    assert Image.open(download(tab, "#gd-png", tmp_path)).size == (saved["width"], saved["height"])
    assert page.models.forwards == forwards

    tab.click("#gd-details button")
    tab.wait_for_selector("#gd-table tbody tr")
    assert tab.locator("#gd-table tbody tr").count() == len(saved["detections"])
    fits(tab)
    assert faint(tab) == []
    tab.screenshot(path=artifacts / f"demo-{width}.png", full_page=True)


def test_names_files_and_tiles_lie_in_an_accordion(tab, example_folder, artifacts, tmp_path):
    (tmp_path / "pets.json").write_text(json.dumps({"pet": ["cat", "dog"], "cup": None}))
    tab.click("#gd-more button")
    tab.set_input_files("#gd-vocabulary input[type=file]", str(tmp_path / "pets.json"))
    tab.get_by_text("Labels of pets.json").wait_for()
    field = tab.locator("#gd-labels textarea")
    assert field.input_value() == "pet: cat, dog\ncup"
    assert field.is_disabled()
    tiles = tab.locator("#gd-tiles input[type=number]")
    tiles.fill("200")
    tiles.press("Enter")
    tab.set_input_files("#gd-picture input[type=file]", str(example_folder / "cat.jpg"))
    tab.wait_for_selector("#gd-picture img")
    tab.click("#gd-detect")
    tab.get_by_text(re.compile(r"in the picture and \d+ tiles")).wait_for()
    seen = presence(tab)
    assert list(seen) == ["pet", "cup"]
    assert seen["pet"][0] > 0.2
    assert tab.locator("#gd-figure .gd-box").first.get_attribute("title").startswith("pet 0.")
    fits(tab)
    assert faint(tab) == []
    tab.screenshot(path=artifacts / f"more-{tab.viewport_size['width']}.png", full_page=True)


def test_a_caption_is_marked_in_the_colours_of_its_boxes(tab, page, example_folder, artifacts):
    open_tab(tab, "Caption")
    tab.set_input_files("#gd-caption-picture input[type=file]", str(example_folder / "cup.jpg"))
    tab.wait_for_selector("#gd-caption-picture img")
    tab.fill("#gd-caption-text textarea", "a cup of coffee with a spoon")
    tab.click("#gd-caption-start")
    tab.wait_for_selector("#gd-caption-status mark")
    assert tab.locator("#gd-caption-status mark").all_inner_texts() == ["cup", "coffee", "spoon"]
    seen = presence(tab, "gd-caption")
    assert list(seen) == ["cup", "coffee", "spoon"]
    boxes = tab.locator("#gd-caption-figure .gd-box")
    assert boxes.count() >= 1
    name = boxes.first.get_attribute("title").rpartition(" ")[0]
    mark = tab.locator("#gd-caption-status mark", has_text=re.compile(f"^{name}$"))
    assert mark.evaluate("e => getComputedStyle(e).backgroundColor") == boxes.first.evaluate(
        "e => getComputedStyle(e).borderTopColor"
    )
    forwards = page.models.forwards
    threshold = tab.locator("#gd-caption-threshold input[type=number]")
    threshold.fill("1")
    threshold.press("Enter")
    tab.wait_for_function("document.querySelectorAll('#gd-caption-figure .gd-box').length === 0")
    assert {found for _, found in presence(tab, "gd-caption").values()} == {"not found"}
    threshold.fill("0.05")
    threshold.press("Enter")
    tab.wait_for_selector("#gd-caption-figure .gd-box")
    assert page.models.forwards == forwards
    fits(tab)
    assert faint(tab) == []
    tab.screenshot(path=artifacts / f"caption-{tab.viewport_size['width']}.png", full_page=True)


@only_desk
def test_markup_in_a_label_is_refused_and_fields_have_accessible_names(tab, example_folder):
    detect(tab, example_folder / "cup.jpg", "<script>document.title = 'taken'</script>")
    tab.get_by_text("which belongs to markup").wait_for()
    assert tab.title() != "taken"
    # The name that a screen reader announces.
    labels = tab.get_by_role("textbox", name=re.compile("^Labels "))
    labels.fill("cup")
    labels.press("Enter")
    tab.wait_for_selector("#gd-figure .gd-box")
    assert tab.locator("#gd-figure img").get_attribute("alt") == "The picture cup.jpg"
    tab.locator("#gd-figure .gd-box").first.focus()
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("cup")


@only_desk
def test_the_keyboard_suffices_and_expired_results_are_announced(tab, page, monkeypatch):
    tab.locator("#gd-labels textarea").focus()
    # An example replaces the file dialog, which belongs to the browser.
    tab.locator("td[tabindex='0']").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#gd-picture img")
    tab.locator("#gd-labels textarea").focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "gd-detect"
    tab.keyboard.press("Space")
    tab.wait_for_selector("#gd-figure .gd-box")
    forwards = page.models.forwards
    tab.locator("#gd-threshold input[type=range]").focus()
    tab.keyboard.press("End")
    count_boxes(tab, 0)
    monkeypatch.setattr(page.state.kept, "get", lambda key: None)
    tab.keyboard.press("Home")
    tab.get_by_text("no longer kept").wait_for()
    assert page.models.forwards == forwards


def test_the_other_tabs_handle_batches_and_comparisons(tab, page, example_folder, tmp_path):
    open_tab(tab, "Batch")
    (tmp_path / "notes.png").write_text("no picture")
    files = [example_folder / "cat.jpg", tmp_path / "notes.png", example_folder / "cup.jpg"]
    tab.set_input_files("#gd-files input[type=file]", [str(file) for file in files])
    tab.locator("#gd-files").get_by_text("notes").first.wait_for()
    tab.click("#gd-batch")
    tab.get_by_text("in 2 pictures").wait_for()
    assert "notes.png is not a picture" in tab.inner_text("#gd-batch-status")
    tab.wait_for_function("document.querySelectorAll('#gd-gallery img').length >= 2")
    tab.wait_for_selector("#gd-batch-file a[download]")

    open_tab(tab, "Compare")
    tab.set_input_files("#gd-compare-picture input[type=file]", str(example_folder / "cup.jpg"))
    tab.wait_for_selector("#gd-compare-picture img")
    tab.click("#gd-compare")
    tab.wait_for_selector("#gd-left .gd-box")
    assert tab.locator("#gd-right img").count() == 1
    forwards = page.models.forwards
    threshold = tab.locator("#gd-compare-threshold input[type=number]")
    threshold.fill("1")
    threshold.press("Enter")
    tab.wait_for_function("document.querySelectorAll('#gd-left .gd-box').length === 0")
    assert page.models.forwards == forwards
    fits(tab)


def test_a_video_is_shown_with_track_ids_and_its_files_are_downloaded(tab, example_folder, artifacts, tmp_path):
    with Image.open(example_folder / "cat.jpg") as cat:
        frames = [ImageOps.expand(cat.resize((240, 160)), (6 * place, 10, 60 - 6 * place, 30)) for place in range(7)]
    write_clip(tmp_path / "cat.mp4", frames)
    open_tab(tab, "Video")
    tab.set_input_files("#gd-video input[type=file]", str(tmp_path / "cat.mp4"))
    tab.wait_for_selector("#gd-video video")
    labels = tab.get_by_role("textbox", name=re.compile("^Labels ")).locator("visible=true")
    labels.fill("cat, cup")
    tab.click("#gd-video-start")
    tab.locator("#gd-video-status").get_by_text("1 track in 7 frames").wait_for()
    row = tab.locator("#gd-video-status tbody tr")
    assert row.locator("td").all_inner_texts()[:4] == ["cat #1", "0.50 s", "0.60 s", "2"]
    tab.wait_for_function("document.querySelector('#gd-video-out video')?.readyState >= 2")
    tab.wait_for_selector("#gd-video-files a[download]")

    files = {}
    for link in tab.locator("#gd-video-files a[download]").all():
        files[link.get_attribute("download")] = tab.request.get(link.get_attribute("href")).text()
    assert set(files) == {"frames.jsonl", "tracks.csv", "tracks.txt", "tracks.coco.json", "summary.json"}
    found = [json.loads(line) for line in files["frames.jsonl"].splitlines()]
    assert [[each["track_id"] for each in frame["detections"]] for frame in found] == [[]] * 5 + [[1]] * 2
    assert files["tracks.txt"].startswith("6,1,")
    assert files["tracks.csv"].splitlines()[1].startswith("1,cat,5,6,")

    video = tmp_path / "annotated.mp4"
    video.write_bytes(tab.request.get(tab.locator("#gd-video-out video").get_attribute("src")).body())
    (shown,) = [frame.image for frame in VideoFile(video) if frame.number == 5]
    box = found[5]["detections"][0]["box"]
    errors = {}
    for number in (1, 8):
        detections = Detections(
            [box], [found[5]["detections"][0]["score"]], [0], ["cat"], shown.size, track_ids=[number]
        )
        drawn = draw_tracks(TrackedFrame(5, 0.5, frames[5], detections, True))
        errors[number] = np.abs(np.asarray(drawn, dtype=float) - np.asarray(shown)).mean()
    assert errors[1] < min(CODEC_ROUNDING, errors[8]), "the video shows another number"
    fits(tab)
    assert faint(tab) == []
    tab.screenshot(path=artifacts / f"video-{tab.viewport_size['width']}.png", full_page=True)
