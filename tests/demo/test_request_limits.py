"""Old files are removed, request bodies have a bounded size, and failures become plain sentences."""

import asyncio
import concurrent.futures
import os
import time

import gradio as gr
import pytest
from gdino_demo.gradio_internals import PlainErrorBlocks, files_of_page
from gdino_demo.request_limits import CheckedSlider, RequestLimits, Sweeper
from gdino_demo.safety import LARGEST_REQUEST, Refused
from gradio_client import handle_file
from PIL import Image

from gdino_hf import Detector


def age(path, seconds):
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def test_old_uploads_are_removed_and_fresh_ones_and_the_page_s_files_stay(tmp_path):
    names = ["old/a.png", "fresh/b.png", "page/example.png"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with gr.Blocks() as blocks:
        image = gr.Image()
    image.keep_in_cache = {str(tmp_path / "page/example.png")}
    sweeper = Sweeper(tmp_path, lambda: files_of_page(blocks), seconds=60)
    for name in ("old/a.png", "old", "page/example.png", "page"):
        age(tmp_path / name, 120)
    sweeper.sweep()
    sweeper.sweep()
    assert not (tmp_path / "old/a.png").exists()
    assert [(tmp_path / name).exists() for name in names[1:]] == [True, True]
    age(tmp_path / "old", 120)
    sweeper.sweep()
    assert not (tmp_path / "old").exists()


def test_the_least_recently_used_files_go_when_all_are_too_large(tmp_path):
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "video.mp4").write_bytes(bytes(100))
        age(tmp_path / str(number) / "video.mp4", 10 * number)
    Sweeper(tmp_path, set, seconds=60, most_bytes=250).sweep()
    assert sorted(path.parent.name for path in tmp_path.rglob("*.mp4")) == ["0", "1"]


def test_a_slider_names_values_that_are_not_numbers_in_its_range():
    slider = CheckedSlider(0, 1, label="Score threshold")
    assert [slider.preprocess(number) for number in (0, 0.5, 1)] == [0, 0.5, 1]
    for wrong in (None, "high", 7, -0.1, float("nan"), True, [0.5]):
        with pytest.raises(Refused, match="Score threshold must be a number from 0 to 1"):
            slider.preprocess(wrong)


def test_using_an_upload_again_prolongs_its_life(page, client, tmp_path):
    upload = tmp_path / "mine.png"
    Image.new("RGB", (40, 30), "red").save(upload)
    client.predict(image=handle_file(upload), labels="cat", api_name="/detect")
    (stored,) = page.folder.glob("*/mine.png")
    age(stored, page.sweeper.seconds - 30)
    client.predict(image=handle_file(upload), labels="cat", api_name="/detect")
    page.sweeper.sweep()
    assert stored.exists()
    age(stored, page.sweeper.seconds + 30)
    page.sweeper.sweep()
    assert not stored.exists()


def test_another_page_of_the_process_comes_and_goes_and_leaves_the_files_of_this_one(page, client, tmp_path):
    from gdino_demo.page import Page

    own = files_of_page(page.blocks)
    other = Page({"nano": Detector("nano")})
    for name, ask in (("while.png", lambda: None), ("after.png", other.close)):
        ask()
        upload = tmp_path / name
        Image.new("RGB", (40, 30), "red").save(upload)
        client.predict(image=handle_file(upload), labels="cat", api_name="/detect")
        assert len(list(page.folder.glob(f"*/{name}"))) == 1
    for path in own:
        age(path, page.sweeper.seconds + 30)
    page.sweeper.sweep()
    assert own
    assert all(map(os.path.exists, own))


def run(work):
    """Run a coroutine in a thread of its own, because browser tests have an event loop in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def through_the_limits(path, headers, method="POST"):
    """Return the status of a refusal, and whether the request was passed on."""
    went, sent = [], []

    async def behind(scope, receive, send):
        went.append(scope)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    run(RequestLimits(behind)(scope, receive, send))
    return (sent[0]["status"] if sent else None), bool(went)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/gradio_api/upload", {"content-length": str(LARGEST_REQUEST)}, None),
        ("/gradio_api/upload", {"content-length": str(2 * LARGEST_REQUEST)}, 413),
        ("/gradio_api/upload/", {"content-length": str(10**15)}, 413),
        ("/gradio_api/queue/join", {"content-length": "1000"}, None),
        ("/gradio_api/queue/join", {"content-length": str(2**21)}, 413),
        ("/gradio_api/queue/join", {"transfer-encoding": "chunked"}, 411),
        ("/gradio_api/queue/join", {"content-length": "-5"}, 411),
        ("/gradio_api/process_recording", {"content-length": "10"}, 403),
    ],
)
def test_request_bodies_have_a_declared_and_bounded_size(path, headers, status):
    assert through_the_limits(path, headers) == (status, status is None)


def test_get_requests_need_no_content_length():
    assert through_the_limits("/config", {}, "GET") == (None, True)


def test_internal_errors_become_a_sentence_without_details():
    secret = "the password of the data base"

    def fail():
        raise RuntimeError(secret)

    with PlainErrorBlocks() as blocks:
        gr.Button().click(fail)
    with pytest.raises(Refused) as refusal:
        run(blocks.process_api(0, []))
    assert secret not in refusal.value.message
    assert "try again" in refusal.value.message
