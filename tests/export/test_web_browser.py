"""The exported page in Chromium: it finds what Python finds, loads once, works offline, and nothing leaves it."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from page_server import static_server
from PIL import Image

from browser_checks import faint, fits
from gdino_hf import NANO, Detector, GDinoProcessor
from gdino_hf.export.web_page import text_facts
from gdino_hf.model.resize_sizes import target_size
from gdino_hf.model.text_prompt import build_prompt, split_labels
from gdino_hf.visualize import label_color

LABELS = "cat, person, cup"
# What the page begins with for gdino-nano, whose processor suppresses at this overlap.
THRESHOLD, OVERLAP = 0.3, 0.6
# What the project promises; the browser decodes JPEG and multiplies in its own way.
MOST_PIXELS, MOST_SCORE = 2.0, 0.01
MOST_SECONDS = 3.0
# Milliseconds. The model takes seconds to start on an idle machine, and test workers share the cores.
PATIENCE = 120_000
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def nano():
    return Detector("nano", optimize=False)


@pytest.fixture(scope="module")
def server(page_site):
    """The page below a sub-path of a host."""
    with static_server(page_site) as server:
        server.address += "some/where/"
        yield server


def open_page(browser, address, **options):
    """Open the page in a browser profile of its own and wait until it is ready or has failed."""
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.errors, tab.asked = [], []
    tab.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    context.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("html[data-state=ready], html[data-state=failed]")
    return tab


@pytest.fixture(scope="module")
def tab(browser, server):
    tab = open_page(browser, server.address, viewport=PHONE)
    assert tab.get_attribute("html", "data-state") == "ready", tab.inner_text("#gd-error")
    yield tab
    tab.context.close()


def detect(tab, picture, labels=LABELS):
    """Type labels, give a picture, and return the boxes that the page shows, best first."""
    tab.fill("#gd-labels", labels)
    tab.set_input_files("#gd-file", picture if isinstance(picture, dict) else str(picture))
    tab.wait_for_selector("html[data-state=ready]")
    shown = [
        (element.get_attribute("data-label"), *map(json.loads, map(element.get_attribute, ("data-score", "data-box"))))
        for element in tab.locator(".gd-box").all()
    ]
    return sorted(shown, key=lambda each: -each[1])


def seconds(tab):
    return float(tab.inner_text("#gd-status").partition(" s on")[0].rpartition(" ")[2])


def assert_same(shown, found):
    """Check that the page shows what Python found."""
    assert [label for label, _, _ in shown] == list(found.text_labels)
    assert len(shown) > 0
    boxes = np.array([box for _, _, box in shown])
    assert np.abs(boxes - found.boxes).max() <= MOST_PIXELS
    assert np.abs(np.array([score for _, score, _ in shown]) - found.scores).max() <= MOST_SCORE


def test_the_readmes_photographs_give_the_boxes_of_python(tab, server, nano, example_folder, artifacts):
    asked = len(server.asked)
    for name in ("cat", "person", "cup"):
        path = example_folder / f"{name}.jpg"
        shown = detect(tab, path)
        assert shown[0][0] == name
        assert_same(shown, nano(path, LABELS, threshold=THRESHOLD, nms_threshold=OVERLAP))
    assert len(server.asked) == asked, "a picture made the page ask its host for something"
    assert all(url.startswith((server.address, "blob:")) for url in tab.asked)
    assert tab.errors == []
    fits(tab)
    assert faint(tab) == []
    tab.screenshot(path=artifacts / "web-export-390.png", full_page=True)


def test_a_turned_picture_and_other_labels(tab, nano, example_folder, tmp_path):
    picture = Image.open(example_folder / "cat.jpg").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    labels = "cat, remote control. U.S. flag"
    shown = detect(tab, tmp_path / "turned.jpg", labels)
    assert_same(shown, nano(tmp_path / "turned.jpg", labels, threshold=THRESHOLD, nms_threshold=OVERLAP))


def test_the_threshold_acts_without_the_model_and_files_hold_what_is_shown(tab, example_folder, tmp_path):
    shown = detect(tab, example_folder / "cup.jpg")
    before = tab.inner_text("#gd-status").partition(" in ")[2]
    tab.locator("#gd-threshold").focus()
    tab.keyboard.press("End")
    assert tab.locator(".gd-box").count() == 0
    assert "Lower the threshold" in tab.inner_text("#gd-status")
    tab.locator("#gd-threshold").fill(str(THRESHOLD))
    assert tab.locator(".gd-box").count() == len(shown)
    assert tab.inner_text("#gd-status").partition(" in ")[2] == before, "moving the slider ran the model"
    with tab.expect_download() as waiting:
        tab.click("#gd-json")
    saved = json.loads(waiting.value.path().read_text(encoding="utf-8"))
    assert waiting.value.suggested_filename == "cup-boxes.json"
    assert [each["label"] for each in saved["detections"]] == [label for label, _, _ in shown]
    with tab.expect_download() as waiting:
        tab.click("#gd-png")
    assert Image.open(waiting.value.path()).size == (saved["width"], saved["height"])


def test_bad_input_is_one_sentence(tab, example_folder):
    nothing = {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"}
    assert detect(tab, nothing) == []
    assert tab.inner_text("#gd-error").startswith("notes.png is not a picture this browser can read; give")
    detect(tab, example_folder / "cup.jpg", " ,. ")
    assert tab.inner_text("#gd-error") == "No label is given; write for instance: cat, remote control."
    detect(tab, example_folder / "cup.jpg", "cup, ???")
    assert tab.inner_text("#gd-error") == "The label '???' has nothing to look for in it; use words."
    detect(tab, example_folder / "cup.jpg", "cat " * 300)
    assert "has 300 tokens but a prompt of 256 takes at most 253; shorten it." in tab.inner_text("#gd-error")


def test_the_policy_blocks_every_way_out(tab, server):
    """Neither the page nor a worker that it starts can reach its own host or another one."""
    asked = len(server.asked)
    with static_server(".") as abroad:
        tried = tab.evaluate(
            """async (addresses) => {
                const refused = (promise) => promise.then(() => "sent", () => "refused");
                const image = (url) => new Promise((done, fail) => {
                    const element = new Image();
                    [element.onload, element.onerror] = [done, fail];
                    element.src = url;
                });
                const script = (url) => import(url);
                const code = "onmessage = ({data}) => fetch(data, {mode: 'no-cors'}).then(() => postMessage('sent'), " +
                    "() => postMessage('refused'))";
                const worker = new Worker(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
                const fromWorker = (url) => new Promise((done) => {
                    worker.onmessage = ({data}) => done(data);
                    worker.postMessage(url);
                });
                const results = [];
                for (const url of addresses) {
                    results.push(await refused(fetch(url, {mode: "no-cors", method: "POST", body: "secret"})));
                    results.push(await refused(image(url)), await fromWorker(url));
                }
                results.push(await refused(script(addresses[1])));
                return results;
            }""",
            [f"{server.address}page_facts.json", f"{abroad.address}secret"],
        )
        assert tried == ["refused"] * 7
        assert abroad.asked == []
    assert len(server.asked) == asked
    tab.errors.clear()


def test_pictures_are_resized_as_pillow_does(tab):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, "PNG")
    sizes, filters = [(40, 31), (61, 20), (120, 200), (7, 300)], [0, 1, 2, 3, 4, 5]
    results = tab.evaluate(
        """async ([code, sizes, filters]) => {
            const {decode, resize} = await import("./pixels.js");
            const bytes = Uint8Array.from(atob(code), (character) => character.charCodeAt(0));
            const bitmap = await decode(new Blob([bytes], {type: "image/png"}), 1e6);
            const all = sizes.flatMap((size) => filters.map((filter) => [...resize(bitmap, size, filter)]));
            return JSON.stringify(all);
        }""",
        [base64.b64encode(file.getvalue()).decode(), sizes, filters],
    )
    asked = [(size, number) for size in sizes for number in filters]
    for (size, number), pixels in zip(asked, json.loads(results), strict=True):
        expected = np.asarray(picture.resize(size[::-1], number))
        assert np.array_equal(np.array(pixels).reshape(*size, 3), expected), (size, number)


def test_a_picture_that_is_not_resized_keeps_its_size(tab):
    assert tab.evaluate("async () => (await import('./pixels.js')).targetSize(48, 64, null)") == [48, 64]


def test_sizes_labels_and_colours_follow_python(tab, nano):
    sizes = [
        {"height": 320, "width": 200},
        {"shortest_edge": 800, "longest_edge": 1333},
        {"shortest_edge": 333},
        {"longest_edge": 501},
        {"max_height": 300, "max_width": 400},
    ]
    originals = [(480, 640), (640, 480), (500, 500), (1, 400), (300, 7), (800, 800), (123, 457), (1001, 1334)]
    texts = [
        "cat, remote control",
        "a cat. a dog",
        "3.5 mm jack, St. Bernard; U.S. flag, e.g. this",
        "  Cat ,cat，cat、ΟΔΟΣ\n日本 人\u200b\ufeffx\x85y",
        "e.g., Mr. Smith, Astr. x, ３.５ mm, naïve café. _a.b_ i.e. that",
        "...,,\n",
    ]
    labels = ["cat", "remote control", "U.S. flag", "naïve café", "ß", "l'été?", "x" * 40, "e-mail (new)", "日本"]
    got = tab.evaluate(
        """async ([sizes, originals, texts, labels, tokenizer, config, text]) => {
            const {targetSize} = await import("./pixels.js");
            const {buildPrompts, splitLabels} = await import("./prompt.js");
            const {labelColor} = await import("./colors.js");
            const {Tokenizer} = await import("./vendor/tokenizers.min.mjs");
            const prompts = buildPrompts(labels, new Tokenizer(JSON.parse(tokenizer), JSON.parse(config)), text);
            return {
                sizes: sizes.map((size) => originals.map((original) => targetSize(...original, size))),
                texts: texts.map(splitLabels),
                colors: (await Promise.all(labels.map(labelColor))).map(({box}) => box),
                prompts,
            };
        }""",
        [sizes, originals, texts, labels, *_tokenizer_files(), _text_facts(max_tokens=24)],
    )
    assert got["sizes"] == [[list(target_size(original, size)) for original in originals] for size in sizes]
    assert got["texts"] == [split_labels(text) for text in texts]
    assert got["colors"] == ["rgb({}, {}, {})".format(*label_color(label)) for label in labels]
    prompt = build_prompt(labels, nano.processor.tokenizer, 24)
    assert len(prompt.chunks) > 1
    assert [each["ids"] for each in got["prompts"]] == [list(chunk.input_ids) for chunk in prompt.chunks]
    assert [each["labels"] for each in got["prompts"]] == [list(chunk.label_indices) for chunk in prompt.chunks]
    assert [each["spans"] for each in got["prompts"]] == [[*map(list, chunk.spans)] for chunk in prompt.chunks]


def _tokenizer_files():
    return [(Path(NANO) / name).read_text(encoding="utf-8") for name in ("tokenizer.json", "tokenizer_config.json")]


def _text_facts(max_tokens):
    return {**text_facts(GDinoProcessor.from_pretrained(NANO)), "max_tokens": max_tokens}


def test_it_works_offline_after_loading(browser, page_site, example_folder):
    with static_server(page_site) as server:
        tab = open_page(browser, f"{server.address}some/where/")
        address, asked = tab.url, list(server.asked)
    # The server is gone.
    assert sum(path.endswith("model.onnx.000") for path in asked) == 1, "the model was loaded twice"
    tab.goto(address)
    tab.wait_for_selector("html[data-state=ready], html[data-state=failed]")
    assert detect(tab, example_folder / "cat.jpg")[0][0] == "cat"
    tab.context.close()


def test_a_truncated_model_file_is_one_sentence(browser, page_site):
    with static_server(page_site) as server:
        server.truncated = "model.onnx.001"
        tab = open_page(browser, f"{server.address}some/where/")
        assert tab.get_attribute("html", "data-state") == "failed"
        assert "model.onnx.001" in tab.inner_text("#gd-error")
        assert "load the page again" in tab.inner_text("#gd-error") or "copy the" in tab.inner_text("#gd-error")
        tab.context.close()


@pytest.mark.soak
def test_a_photograph_takes_less_than_three_seconds(tab, example_folder):
    """By itself, because other test workers would share the cores."""
    for name in ("cat", "person", "cup"):
        detect(tab, example_folder / f"{name}.jpg")
        assert seconds(tab) < MOST_SECONDS


@pytest.mark.soak
def test_without_a_service_worker_there_is_one_thread_and_a_word_about_it(browser, server, example_folder):
    tab = open_page(browser, server.address, service_workers="block")
    assert "on 1 thread of the processor" in tab.inner_text("#gd-status")
    assert "slower" in tab.inner_text("#gd-status") or "no threads" in tab.inner_text("#gd-status")
    assert detect(tab, example_folder / "cat.jpg")[0][0] == "cat"
    tab.context.close()
