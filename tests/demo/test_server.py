"""The running server: equal results to the Python API, many clients at once, and refusal of hostile requests."""

import base64
import concurrent.futures
import contextlib
import ctypes
import gc
import io
import json
import struct
import urllib.error
import urllib.parse
import urllib.request
import zlib

import numpy as np
import psutil
import pytest
from gdino_demo.queries import WHOLE
from gdino_demo.safety import LARGEST_REQUEST
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from gdino_hf import Vocabulary

# The page optimizes the model, which rounds differently; scores are near 0.3, sides are hundreds of pixels.
SCORE_ROUNDING, BOX_ROUNDING = 1e-4, 0.1
CLIENTS, REQUESTS = 8, 24


def post(page, path, body, content_type="application/json"):
    """Send a raw request and return status and text of the answer."""
    request = urllib.request.Request(page.address + "gradio_api/" + path, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call_detect(page, image, labels="cat"):
    """Call /detect without gradio's client and return ("complete" or "error", text)."""
    data = [image, labels, "", "nano", 0.2, 0.5, 0.0, 0, None]
    _, text = post(page, "call/detect", json.dumps({"data": data}).encode())
    with urllib.request.urlopen(f"{page.address}gradio_api/call/detect/{json.loads(text)['event_id']}") as answer:
        lines = answer.read().decode().splitlines()
    return lines[-3].removeprefix("event: "), lines[-2].removeprefix("data: ")


def file_at(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture
def still_serving(page, client, example_folder):
    """Check after the test that the page still detects."""
    yield
    found = client.predict(image=handle_file(example_folder / "cat.jpg"), labels="cat", api_name="/detect")
    assert [detection["label"] for detection in found["detections"]] == ["cat"]


@pytest.mark.parametrize("name", ["cat", "person", "cup"])
def test_a_client_gets_the_results_of_the_python_api(client, nano, example_folder, name):
    path, labels = example_folder / f"{name}.jpg", ["cat", "person", "cup"]
    found = client.predict(
        image=handle_file(path), labels=", ".join(labels), threshold=0.1, nms=0.5, api_name="/detect"
    )
    expected = nano(path, labels, threshold=0.1, nms_threshold=0.5)
    assert len(expected) > 0
    assert [each["label"] for each in found["detections"]] == expected.text_labels
    assert [each["label_index"] for each in found["detections"]] == expected.labels.tolist()
    scores, boxes = ([each[key] for each in found["detections"]] for key in ("score", "box"))
    assert np.allclose(scores, expected.scores, rtol=0, atol=SCORE_ROUNDING)
    assert np.allclose(boxes, expected.boxes, rtol=0, atol=BOX_ROUNDING)
    assert found["presence"] == pytest.approx(expected.presence, abs=SCORE_ROUNDING)


def test_negative_labels_take_boxes_and_are_left_out(client, example_folder):
    picture = handle_file(example_folder / "cat.jpg")
    found = client.predict(image=picture, labels="dog", negatives="cat", threshold=0.05, api_name="/detect")
    alone = client.predict(image=picture, labels="dog", threshold=0.05, api_name="/detect")
    assert {each["label"] for each in found["detections"]} <= {"dog"}
    assert len(found["detections"]) < len(alone["detections"])


def test_a_caption_gives_boxes_with_the_characters_of_their_phrases(client, nano, example_folder):
    caption, path = "a cup of coffee with a spoon", example_folder / "cup.jpg"
    found = client.predict(
        image=handle_file(path), caption=caption, reading=WHOLE, threshold=0.02, nms=1, api_name="/ground"
    )
    expected = nano.ground(path, caption, threshold=0.02)
    assert found["labels"] == ["cup", "coffee", "spoon"]
    assert found["caption"] == caption
    assert found["presence"] == pytest.approx(expected.presence, abs=SCORE_ROUNDING)
    assert len(found["detections"]) > 0
    for each in found["detections"]:
        (start, end) = each["spans"][0]
        assert caption[start:end] == each["label"]
        assert max(score for _, score in each["token_scores"]) == pytest.approx(each["score"], abs=1e-6)


def test_phrases_by_themselves_have_the_scores_of_labels(client, nano, example_folder):
    caption, path = "a cup and another cup with a spoon", example_folder / "cup.jpg"
    found = client.predict(image=handle_file(path), caption=caption, threshold=0.1, nms=1, api_name="/ground")
    expected = nano(path, ["cup", "spoon"], threshold=0.1, nms_threshold=1)
    assert found["presence"] == pytest.approx(expected.presence, abs=SCORE_ROUNDING)
    assert [each["label"] for each in found["detections"]] == expected.text_labels
    assert found["detections"][0]["spans"] == [[2, 5], [18, 21]]


def test_aliases_vocabulary_files_and_tiles_reach_the_model(client, nano, example_folder, tmp_path):
    path = example_folder / "cat.jpg"
    names = {"pet": ["cat", "dog"], "cup": None}
    expected = nano(path, Vocabulary(names), threshold=0.1, tiles=200, nms_threshold=0.5)
    Vocabulary(names).save(tmp_path / "pets.safetensors")
    (tmp_path / "pets.json").write_text(json.dumps(names))
    answers = [
        client.predict(image=handle_file(path), threshold=0.1, nms=0.5, tiles=200, api_name="/detect", **query)
        for query in (
            {"labels": "pet: cat, dog; cup"},
            {"labels": "", "vocabulary": handle_file(tmp_path / "pets.safetensors")},
            {"labels": "", "vocabulary": handle_file(tmp_path / "pets.json")},
        )
    ]
    for found in answers:
        assert found["labels"] == ["pet", "cup"]
        assert (found["tiles"], found["tiles_searched"] > 1) == (200, True)
        assert [each["label"] for each in found["detections"]] == expected.text_labels
        boxes = [each["box"] for each in found["detections"]]
        assert np.allclose(boxes, expected.boxes, rtol=0, atol=BOX_ROUNDING)
    with pytest.raises(AppError, match="choose larger tiles"):
        client.predict(image=handle_file(path), labels="cat", tiles=32, api_name="/detect")


@pytest.mark.usefixtures("still_serving")
def test_vocabulary_files_have_limits_of_their_own(page, client, example_folder, tmp_path):
    picture = handle_file(example_folder / "cat.jpg")
    for name, content, sentence in (
        ("a.json", "{'cat'}", "a.json is not a label file"),
        ("a.txt", "x" * 5000, "shorten"),
        ("a.txt", "\n".join(map(str, range(101))), "101 labels"),
        ("a.txt", "<img src=x onerror=alert(1)>", "angle bracket"),
        ("a.txt", "cat" * 3_000_000, "a vocabulary may have 8 MB"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(AppError, match=sentence):
            client.predict(image=picture, labels="", vocabulary=handle_file(tmp_path / name), api_name="/detect")
    for path in ("/etc/passwd", "http://127.0.0.1/a.txt"):
        data = [None, "", "", "nano", 0.2, 0.5, 0.0, 0, file_at(path)]
        _, text = post(page, "call/detect", json.dumps({"data": data}).encode())
        with urllib.request.urlopen(f"{page.address}gradio_api/call/detect/{json.loads(text)['event_id']}") as answer:
            assert "upload" in answer.read().decode()


def test_a_batch_names_unreadable_files_and_goes_on(client, example_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    files = [example_folder / "cat.jpg", tmp_path / "notes.txt", example_folder / "cup.jpg"]
    found = client.predict(files=[handle_file(file) for file in files], labels="cat, cup", api_name="/batch")
    assert [image["file_name"] for image in found["images"]] == ["cat.jpg", "cup.jpg"]
    assert {(a["image_id"], a["category_id"]) for a in found["annotations"]} == {(1, 1), (2, 2)}
    assert [failure["image"] for failure in found["failed"]] == ["notes.txt"]
    assert "not a picture" in found["failed"][0]["error"]
    # An error of the request itself is reported once, not for every file.
    with pytest.raises(AppError, match="leave it in one"):
        client.predict(files=[handle_file(files[0])] * 2, labels="cat", negatives="cat", api_name="/batch")


def test_two_prompts_are_compared_on_one_picture(client, example_folder):
    picture = handle_file(example_folder / "cat.jpg")
    both = client.predict(image=picture, left_labels="cat", right_labels="dog, cat", api_name="/compare")
    assert both["left"]["labels"] == ["cat"]
    assert both["right"]["labels"] == ["dog", "cat"]
    assert both["left"]["detections"] == client.predict(image=picture, labels="cat", api_name="/detect")["detections"]


def test_endpoints_are_documented_and_the_page_s_own_events_are_not(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/detect", "/detect_url", "/ground", "/batch", "/video", "/compare"}
    assert all(endpoint["description"] for endpoint in endpoints.values())
    names = [each["parameter_name"] for each in endpoints["/detect"]["parameters"]]
    assert names[:3] == ["image", "labels", "negatives"]


def test_many_clients_at_once_get_their_own_results(page, example_folder, tmp_path):
    clients = [Client(page.address, verbose=False) for _ in range(CLIENTS)]
    labels = ["cat", "person", "cup", "cat, person", "cup, cat"]
    cases = []
    for number in range(10):
        # Small pictures of different sizes, so that every case has another result.
        with Image.open(example_folder / f"{('cat', 'person', 'cup')[number % 3]}.jpg") as image:
            picture = image.resize((240 + 8 * number, 200))
        cases.append((picture, labels[number % len(labels)]))

    def ask(number):
        picture, wanted = cases[number % len(cases)]
        path = tmp_path / f"{number}.png"
        picture.save(path, compress_level=1)
        found = clients[number % CLIENTS].predict(
            image=handle_file(path), labels=wanted, threshold=0, api_name="/detect"
        )
        assert found.pop("image") == path.name
        assert found.pop("seconds") > 0
        return found

    # One after the other first, which also allocates what is used again (threads, arenas, sessions).
    alone = [ask(number) for number in range(len(cases))]
    assert len({json.dumps(answer["detections"]) for answer in alone}) == len(cases)
    assert all(answer["detections"] for answer in alone)
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))
        before, forwards = memory(), page.models.forwards
        answers = list(pool.map(ask, range(REQUESTS)))
    after = memory()
    assert page.models.forwards - forwards == REQUESTS
    assert answers == [alone[number % len(cases)] for number in range(REQUESTS)]
    assert after < 1.1 * before, f"{before / 2**20:.0f} MB before, {after / 2**20:.0f} MB afterwards"


def memory():
    """Return the memory of this process with the server in bytes, after the C library returned its free memory."""
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def upload(page, picture):
    """Upload a picture without gradio's client and return its path on the server."""
    buffer, boundary = io.BytesIO(), "----boundary"
    picture.save(buffer, "PNG", compress_level=1)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body = head + buffer.getvalue() + f"\r\n--{boundary}--\r\n".encode()
    status, text = post(page, "upload", body, f"multipart/form-data; boundary={boundary}")
    assert status == 200
    return json.loads(text)[0]


@pytest.mark.parametrize("requests", [40, pytest.param(300, marks=pytest.mark.fuzz)])
def test_memory_comes_back_after_many_different_requests(requests, page, example_folder):
    with Image.open(example_folder / "cat.jpg") as image:
        pictures = [image.resize((200 + number % 80, 160 + 7 * number % 120)) for number in range(requests)]

    def ask(number):
        event, text = call_detect(page, file_at(upload(page, pictures[number])), f"cat, thing {number}, dog")
        assert event == "complete", text

    def settled():
        gc.collect()
        # What the page's own thread does every 20 seconds.
        page.sweeper.tidy()
        return psutil.Process().memory_info().rss

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(20)))
        before = settled()
        list(pool.map(ask, range(requests)))
    after = settled()
    assert after < 1.1 * before, f"{before / 2**20:.0f} MB before, {after / 2**20:.0f} MB afterwards"


def bomb():
    """Return a PNG of a few kilobytes that claims 2.5 billion pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 2_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("bomb.png", bomb(), "a picture may have 40 million"),
        ("notes.txt", b"only words", "not a picture that can be read here"),
        ("words.png", b"only words", "not a picture that can be read here"),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "SVG drawing"),
        ("large.png", b"\x89PNG\r\n\x1a\n" + bytes(21 * 2**20), "a picture may have 20 MB"),
    ],
)
@pytest.mark.usefixtures("still_serving")
def test_files_that_are_not_pictures_are_refused(client, tmp_path, name, data, sentence):
    path = tmp_path / name
    path.write_bytes(data)
    before = memory()
    with pytest.raises(AppError, match=sentence) as refusal:
        client.predict(image=handle_file(path), labels="cat", api_name="/detect")
    assert str(refusal.value).strip("'").startswith(name.rsplit(".", 1)[0])
    assert memory() < before + 100 * 2**20, "the pixels were decoded"


@pytest.mark.usefixtures("still_serving")
def test_a_200_mb_upload_is_refused(page):
    boundary = "----boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'.encode()
    body = head + bytes(200 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    status, text = post(page, "upload", body, f"multipart/form-data; boundary={boundary}")
    assert (status, text) == (413, "The request has 200 MB; at most 100 MB are taken at once.")
    stored = sum(path.stat().st_size for path in page.folder.rglob("*") if path.is_file())
    assert stored < LARGEST_REQUEST


@pytest.mark.usefixtures("still_serving")
def test_files_inside_of_messages_are_refused(page):
    status, text = post(page, "call/detect", json.dumps({"data": ["x" * 2**21]}).encode())
    assert status == 413
    assert "at most 1 MB" in text
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    event, text = call_detect(page, {"url": address, "meta": {"_type": "gradio.FileData"}})
    assert (event, "upload the file" in text) == ("error", True)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "http://[::1]:7860/",
        "http://2130706433/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
        "ftp://example.org/a",
    ],
)
@pytest.mark.usefixtures("still_serving")
def test_addresses_of_this_machine_are_refused(page, client, address):
    with pytest.raises(AppError, match=r"not on the public internet|begin with http|names the port"):
        client.predict(address=address, labels="cat", api_name="/detect_url")
    # The address in place of an uploaded file.
    event, text = call_detect(page, file_at(address))
    assert event == "error"
    assert "upload" in text


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "/proc/self/environ", "\0"])
@pytest.mark.usefixtures("still_serving")
def test_paths_outside_the_folder_are_refused(page, path):
    for file in (file_at(path), file_at(path, url="/gradio_api/file=" + path), {"path": path}):
        event, text = call_detect(page, file)
        assert event == "error"
        assert "upload" in text or "Something went wrong" in text
        assert "root:" not in text
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{page.address}gradio_api/file={urllib.parse.quote(path)}")
    assert refusal.value.code == 403


def test_the_server_fetches_nothing_for_others(page):
    for path in ("file=http://127.0.0.1/", "file=https://example.org/", "proxy=http://127.0.0.1/"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{page.address}gradio_api/{path}")
        assert refusal.value.code == 403


@pytest.mark.parametrize("label", ["<script>alert(1)</script>", "cat, <img src=x onerror=alert(1)>", "a" * 5000, ""])
@pytest.mark.usefixtures("still_serving")
def test_labels_with_markup_or_without_words_are_refused(client, example_folder, label):
    with pytest.raises(AppError) as refusal:
        client.predict(image=handle_file(example_folder / "cat.jpg"), labels=label, api_name="/detect")
    assert "<" not in str(refusal.value)


def test_values_that_the_fields_do_not_offer_are_refused_in_words(client, example_folder):
    picture = handle_file(example_folder / "cat.jpg")
    threshold = "Score threshold must be a number from 0 to 1"
    for name, value, sentence in (
        ("model", "/etc", "not in the list of choices"),
        ("tiles", -1, "Tiles must be a number from 0 to 2000"),
        ("threshold", 7, threshold),
        ("threshold", "high", threshold),
        ("threshold", None, threshold),
    ):
        with pytest.raises(AppError, match=sentence):
            client.predict(image=picture, labels="cat", api_name="/detect", **{name: value})
