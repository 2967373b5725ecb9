"""Connections that are slow are closed, calls of functions that do not exist are the client's errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from gdino_demo import request_limits
from gdino_demo.connection_limits import TooSlowError, accepted, within
from gdino_demo.gradio_internals import connections_of

# Long enough for a loaded machine, short beside the minute that an open connection would last.
PATIENCE = 20


def connect(page):
    parts = urllib.parse.urlsplit(page.address)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


def request(path, *headers, body=b""):
    lines = [f"POST /gradio_api/{path} HTTP/1.1", "Host: page", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_to_the_end(connection):
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: page\r\n", b"GET / HTTP/1.1\r\nHost: page\r\n\r\nGET /a"],
    ids=["nothing", "half a line", "half the headers", "half a second request"],
)
def test_a_connection_without_a_complete_request_is_closed(sent, page, monkeypatch):
    monkeypatch.setattr(page.watcher, "seconds", 1.0)
    with connect(page) as connection:
        connection.sendall(sent)
        start = time.monotonic()
        answer = read_to_the_end(connection)
        assert time.monotonic() - start < PATIENCE
    assert (b"200 OK" in answer) == (sent.count(b"\r\n\r\n") == 1)


def test_bytes_that_trickle_in_do_not_prolong_it(page, monkeypatch):
    monkeypatch.setattr(page.watcher, "seconds", 1.0)
    with connect(page) as connection:
        start = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012  the connection is closed while it sends
            for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize("path", ["queue/join", "call/detect", "upload"])
def test_a_body_that_does_not_arrive_is_answered_and_the_connection_closed(path, page, monkeypatch):
    monkeypatch.setattr(request_limits, "MESSAGE_SECONDS", 0.5)
    monkeypatch.setattr(request_limits, "UPLOAD_SECONDS", 0.5)
    monkeypatch.setattr(page.watcher, "seconds", 2.0)
    kind = "multipart/form-data; boundary=x" if path == "upload" else "application/json"
    with connect(page) as connection:
        connection.sendall(request(path, f"Content-Type: {kind}", "Content-Length: 900", body=b'{"data": ['))
        answer = read_to_the_end(connection)
    assert answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400"))


def test_streams_of_events_stay_open(page, monkeypatch):
    monkeypatch.setattr(page.watcher, "seconds", 0.5)
    with connect(page) as connection:
        connection.sendall(b"GET /gradio_api/heartbeat/someone HTTP/1.1\r\nHost: page\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        time.sleep(2)
        assert any(not each.waits for each in connections_of(page.blocks))
        connection.settimeout(0.2)
        # Open, with nothing to say.
        with contextlib.suppress(TimeoutError):
            assert connection.recv(65536) != b""


def run(work):
    """Run a coroutine in a thread of its own, because browser tests have an event loop in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def test_a_piece_of_the_answer_that_nobody_accepts_is_given_up():
    async def stuck(message):
        await asyncio.sleep(60)

    async def write():
        with pytest.raises(TooSlowError):
            await accepted(stuck, 0.05)({"type": "http.response.body"})

    run(write())


def test_only_the_body_has_to_arrive_in_time():
    async def read():
        messages = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]

        async def receive():
            if not messages:
                await asyncio.sleep(0.3)
                return {"type": "http.disconnect"}
            return messages.pop(0)

        limited = within(receive, 0.1)
        return [await limited() for _ in range(3)]

    assert [message["type"] for message in run(read())] == ["http.request", "http.request", "http.disconnect"]


def post(page, path, body):
    call = urllib.request.Request(page.address + "gradio_api/" + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


ODD = [-1, 999_999, 10**26, "x", "0", 1.5, True, [1], {}, float("inf"), float("nan")]


@pytest.mark.parametrize("path", ["queue/join", "run/predict", "run/detect", "api/predict/", "call/nosuch"])
@pytest.mark.parametrize("number", ODD, ids=str)
def test_an_odd_fn_index_is_the_clients_error(number, path, page):
    status, text = post(page, path, json.dumps({"data": [], "fn_index": number, "session_hash": "a"}).encode())
    assert 400 <= status < 500, text
    assert "Traceback" not in text


@pytest.mark.parametrize("path", ["cancel", "reset", "component_server", "queue/join", "run/detect"])
def test_half_of_a_surrogate_pair_is_the_clients_error(path, page):
    status, text = post(page, path, rb'{"fn_index": "\ud800", "data": ["\udfff"], "session_hash": "a"}')
    assert 400 <= status < 500, text
    assert "Traceback" not in text


@pytest.mark.parametrize("path", ["call/nosuch", "run/nosuch", "api/nosuch", "queue/join", "run/predict"])
def test_a_function_that_does_not_exist_is_named(path, page):
    status, text = post(page, path, b'{"data": [], "session_hash": "a"}')
    assert status == 404
    assert "/gradio_api/info lists them" in text


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"x"', b"[" * 50_000, b'{"data": [1e400]}', b"\xff\xfe"])
@pytest.mark.parametrize("path", ["queue/join", "call/detect", "run/detect"])
def test_a_body_that_is_no_call_is_the_clients_error(body, path, page):
    status, text = post(page, path, body)
    assert 400 <= status < 500, text


def test_too_few_values_are_named(page):
    status, text = post(page, "run/detect", b'{"data": [], "session_hash": "a"}')
    assert status == 422
    assert "values in data, but the message has 0" in text
