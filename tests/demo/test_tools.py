"""Tools for agents: listed with their arguments, called over loopback, and within the limits of the page."""

import asyncio
import base64
import concurrent.futures
import io
import json
import re
import textwrap
import threading
from pathlib import Path

import pytest
from gdino_demo import tools
from gdino_demo.safety import LARGEST_PICTURE, Refused
from PIL import Image

mcp = pytest.importorskip("mcp", reason="tools need mcp (the demo extra)")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool_page():
    """A running page that offers tools, at `tool_page.address`."""
    from gdino_demo.page import Page

    from gdino_hf import Detector

    page = Page({"nano": Detector("nano")}, mcp=True)
    page.address = page.launch(wait=False, quiet=True)
    yield page
    page.close()


def ask(page, work):
    """Run `work(session)` with a client session, in a thread that has no event loop yet."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def connect():
        async with (
            streamable_http_client(page.address + "gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await work(session)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, connect()).result()


def call(page, name, **arguments):
    """Return whether a call of a tool failed, and its text."""
    answer = ask(page, lambda session: session.call_tool(name, arguments))
    (content,) = answer.content
    return answer.isError, content.text


def data_url(path):
    return "data:image/jpeg;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def test_tools_have_plain_names_and_describe_every_argument(tool_page):
    found = {tool.name: tool for tool in ask(tool_page, lambda session: session.list_tools()).tools}
    assert set(found) == {"detect", "ground"}
    for tool in found.values():
        assert "boxes" in tool.description
        assert "upload" not in tool.description
        properties = tool.inputSchema["properties"]
        assert all(len(each["description"]) > 15 for name, each in properties.items() if name != "model")
        assert properties["model"]["enum"] == ["nano"]
        assert all(each["description"].endswith(".") for each in properties.values())
    assert set(found["detect"].inputSchema["required"]) == {"picture", "labels"}
    assert set(found["ground"].inputSchema["required"]) == {"picture", "caption"}
    assert found["detect"].inputSchema["properties"]["threshold"]["default"] == 0.2


def test_an_agent_detects_what_the_detector_does(tool_page, nano, example_folder):
    path = example_folder / "cat.jpg"
    failed, text = call(tool_page, "detect", picture=data_url(path), labels="cat: cat, kitten; dog", threshold=0.2)
    found = json.loads(text)
    expected = nano(path, {"cat": ["cat", "kitten"], "dog": None}, threshold=0.2, nms_threshold=0.5)
    assert not failed
    assert [each["label"] for each in found["detections"]] == expected.text_labels == ["cat"]
    assert found["detections"][0]["box"] == pytest.approx(expected.boxes[0].tolist(), abs=0.1)
    assert found["presence"] == pytest.approx(expected.presence, abs=1e-4)


def test_an_agent_grounds_a_caption(tool_page, example_folder):
    caption = "a cup of coffee with a spoon"
    _, text = call(tool_page, "ground", picture=data_url(example_folder / "cup.jpg"), caption=caption, threshold=0.1)
    found = json.loads(text)
    assert set(found["presence"]) == {"cup", "coffee", "spoon"}
    assert {caption[slice(*each["spans"][0])] for each in found["detections"]} <= set(found["presence"])


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("http://127.0.0.1/", "not on the public internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public internet"),
        ("http://example.org:22/", "names the port 22"),
        ("file:///etc/passwd", "begin with http"),
        ("/etc/passwd", "begin with http"),
        ("", "begin with http"),
        ("data:image/png;base64,####", "not valid base64"),
        ("data:image/png,abc", "does not hold base64"),
        ("data:image/png;base64," + base64.b64encode(b"only words").decode(), "not a picture that can be read here"),
    ],
)
def test_pictures_that_agents_may_not_name_are_refused(tool_page, picture, sentence):
    failed, text = call(tool_page, "detect", picture=picture, labels="cat")
    assert failed
    assert sentence in text
    assert "Traceback" not in text


def test_values_of_agents_have_the_limits_of_the_page(tool_page, example_folder):
    picture = data_url(example_folder / "cat.jpg")
    for arguments, sentence in (
        ({"labels": "<b>"}, "angle bracket"),
        ({"labels": ""}, "There is no label"),
        ({"labels": "cat", "threshold": 7}, "must be a number from 0 to 1"),
        ({"labels": "cat", "tiles": 32}, "choose larger tiles"),
        ({"labels": "cat", "tiles": 31}, "at least 32"),
        ({"labels": "cat", "model": "/etc"}, "not one of"),
    ):
        failed, text = call(tool_page, "detect", picture=picture, **arguments)
        assert failed
        assert sentence in text, text


def test_other_functions_cannot_be_called_by_agents(tool_page, example_folder):
    before = set(tool_page.folder.rglob("*.jpeg"))
    for name in ("detect_endpoint", "batch_endpoint", "on_detect"):
        failed, text = call(tool_page, name, image=data_url(example_folder / "cat.jpg"), labels="cat")
        assert failed
        assert "nknown tool" in text
    assert set(tool_page.folder.rglob("*.jpeg")) == before, "a picture of a message was stored"


def test_calls_beyond_the_limit_are_told_to_wait():
    places = threading.BoundedSemaphore(1)
    with tools._place(places), pytest.raises(Refused, match="try again in a few seconds"), tools._place(places):
        pass
    with tools._place(places):
        pass


def test_a_picture_in_a_message_is_no_larger_than_an_upload():
    with pytest.raises(Refused, match="more than 20 MB"):
        tools.picture_of("data:image/png;base64," + "A" * (LARGEST_PICTURE * 4 // 3 + 8))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    assert tools.picture_of(f" DATA:image/png;base64,{code}").image.size == (8, 6)


def test_the_call_in_the_documentation_works(tool_page, capfd, monkeypatch):
    text = (REPOSITORY / "docs" / "web-page.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "ClientSession" in block)
    assert "http://127.0.0.1:7860/" in code
    monkeypatch.chdir(REPOSITORY)
    code = textwrap.dedent(code).replace("http://127.0.0.1:7860/", tool_page.address)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(exec, code, {"__name__": "agent"}).result()
    printed = capfd.readouterr().out
    assert "['detect', 'ground']" in printed
    assert re.search(r"cat 0\.\d+ \[\d+, \d+, \d+, \d+\]", printed)
