"""Limits on requests: oversized bodies and files are refused before they are read, and old files are removed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from .connection_limits import (
    MESSAGE_SECONDS,
    UPLOAD_SECONDS,
    Message,
    Receive,
    Send,
    TooSlowError,
    accepted,
    within,
)
from .gradio_internals import (
    NOT_UPLOADED,
    ShownAsOriginal,
    UploadsOnly,
    functions_of_page,
    upload_folder,
)
from .safety import KEPT_SECONDS, LARGEST_REQUEST, MEGABYTE, Refused, read_picture

MOST_STORED = 2 * 2**30
"""Largest size in bytes of all visitors' files together."""

_SWEEP_SECONDS = 20
_LARGEST_MESSAGE = MEGABYTE
# Agents send pictures within a message, in base64: those of up to 6 MB.
_LARGEST_TOOL_CALL = 8 * MEGABYTE
_TOOLS = re.compile(r"/gradio_api/mcp(?:/http|/messages)?/?")
# A multipart body is a little larger than the file in it.
_MARGIN = 64 * 1024


class RequestLimits:
    """ASGI middleware that bounds the size of request bodies and keeps the server from fetching web addresses.

    Without it, gradio fetches addresses that are given as file names and accepts files inside of messages. Pictures
    come by upload or through `fetch`, which have their own limits.

    Args:
        app: The ASGI application behind the limits.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Refuse a request that exceeds the limits, or pass it on to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await self._drain(scope, within(receive, MESSAGE_SECONDS))
            await self._answer(send, *refusal)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        receive, send = within(receive, UPLOAD_SECONDS if is_upload else MESSAGE_SECONDS), accepted(send)
        answered = False

        async def send_and_note(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            if scope["method"] == "POST" and not is_upload:
                body = await self._body(receive)
                is_json = b"json" in dict(scope["headers"]).get(b"content-type", b"json").lower()
                refusal = faulty_call(scope.get("app"), scope["path"], body) if is_json else None
                if refusal is not None:
                    await self._answer(send, *refusal)
                    return
                receive = self._replay(body, receive)
            await self.app(scope, receive, send_and_note)
        except TooSlowError:
            if not answered:
                await self._answer(send, 408, "The request arrives too slowly; send it again on a faster connection.")

    @staticmethod
    async def _body(receive: Receive) -> bytes:
        """Read the body of a message, whose declared size was checked."""
        parts = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return b"".join(parts)

    @staticmethod
    def _replay(body: bytes, receive: Receive) -> Receive:
        """Return a `receive` that hands out a body that was read, and then what the client does."""
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    @staticmethod
    async def _answer(send: Send, status: int, sentence: str) -> None:
        """Answer with a sentence and close the connection."""
        body = sentence.encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    async def _drain(scope: Message, receive: Receive) -> None:
        """Discard a body of up to four times the limit, so that the client gets the response and not a broken pipe."""
        size = int(dict(scope["headers"]).get(b"content-length", b"0") or 0)
        if size > 4 * LARGEST_REQUEST:
            return
        with contextlib.suppress(TooSlowError):
            while size > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return

    @staticmethod
    def _refusal(scope: Message) -> tuple[int, str] | None:
        """Return status and message for a request that is refused, or None."""
        path: str = scope["path"]
        for fetched in ("/file=http:", "/file=https:", "/proxy=", "/process_recording"):
            if fetched in path.lower():
                return (
                    403,
                    "This server does not open web addresses in this way; use the field for addresses on the page.",
                )
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers or not headers.get(b"content-length", b"0").isdigit():
            return 411, "The size of the request is not declared; send a Content-Length."
        size = int(headers.get(b"content-length", b"0"))
        limit = _LARGEST_TOOL_CALL if _TOOLS.fullmatch(path) else _LARGEST_MESSAGE
        if path.rstrip("/").endswith("/upload"):
            limit = LARGEST_REQUEST + _MARGIN
        if size > limit:
            return 413, f"The request has {size // MEGABYTE} MB; at most {limit // MEGABYTE} MB are taken at once."
        return None


_CALL = re.compile(r"/(?:queue/join|(?:run|api|call)(?:/v\d+)?/(?P<name>[^/]+))/?")


def faulty_call(app: Any, path: str, body: bytes) -> tuple[int, str] | None:
    """Return status and message for a message that calls no function of the page, or None.

    Args:
        app: gradio's FastAPI application.
        path: Path of the request.
        body: Its body; other bodies than JSON are left to the application.
    """
    try:
        content = json.loads(body or b"null")
        # JSON has no infinity, but a number such as 1e400 is read as one.
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError):
        return 400, "The message is not JSON with finite numbers; send a JSON object."
    call = re.search(_CALL.pattern + "$", path)
    if call is None and not _is_text(content):
        # The web framework repeats what it refuses, and cannot write such characters.
        return 400, "The message holds characters that are not Unicode text; send a JSON object."
    functions = functions_of_page(app) if call else {}
    if call is None or not functions:
        return None
    if not isinstance(content, dict):
        return 422, "The message is not a JSON object; send one with the list data."
    number = content.get("fn_index")
    if number is None:
        names = {name: other for other, (name, _) in functions.items() if name is not None}
        if call["name"] is None or call["name"] not in names:
            return (
                404,
                f"This page has no function {call['name'] or 'without fn_index'!r}; /gradio_api/info lists them.",
            )
        number = names[call["name"]]
    elif isinstance(number, bool) or not isinstance(number, int) or number not in functions:
        return 404, f"This page has no function with the fn_index {str(number)[:20]!r}; /gradio_api/info lists them."
    data, least = content.get("data"), functions[number][1]
    if isinstance(data, list) and len(data) < least:
        return 422, f"The function takes {least} values in data, but the message has {len(data)}; send all of them."
    return None


def _is_text(content: Any) -> bool:
    """Whether all text of a message can be written as UTF-8, which halves of surrogate pairs cannot."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class CheckedSlider(ShownAsOriginal, gr.Slider):
    """A slider that refuses anything but a number in its range, for instance the value of a cleared field."""

    def preprocess(self, payload: Any) -> Any:
        """Return the number."""
        number = payload if isinstance(payload, (int, float)) and not isinstance(payload, bool) else math.nan
        if not self.minimum <= number <= self.maximum:
            raise Refused(f"{self.label} must be a number from {self.minimum} to {self.maximum}; choose one.")
        return number


class CheckedImage(UploadsOnly, gr.Image):
    """An image field whose file is checked before it is decoded; event functions get a `Picture`."""

    def preprocess(self, payload: Any) -> Any:
        """Return the checked picture, or None for an empty field."""
        if payload is None:
            return None
        return read_picture(_own(payload.path), payload.orig_name or Path(payload.path).name)


class CheckedFiles(UploadsOnly, gr.File):
    """A field for many files; event functions get (path, name) pairs and read them one at a time."""

    def preprocess(self, payload: Any) -> Any:
        """Return pairs of path and file name."""
        files = getattr(payload, "root", payload) or []
        files = files if isinstance(files, list) else [files]
        return [(_own(file.path), file.orig_name or Path(file.path).name) for file in files]


class CheckedVideo(UploadsOnly, gr.Video):
    """A video field that passes on the file's path; gradio's own field would run a converter before any check."""

    def preprocess(self, payload: Any) -> Any:
        """Return the path, or None for an empty field."""
        return None if payload is None else _own(payload.path)


def _own(path: str | None) -> str:
    """Return the path of an uploaded file unchanged; refuse paths outside the upload folder."""
    if not path:
        raise Refused("Files are not taken from inside a message; upload the file.")
    if not Path(path).resolve().is_relative_to(upload_folder()):
        raise Refused(NOT_UPLOADED)
    return path


def return_free_memory() -> None:
    """Have the C library return freed memory to the system; it keeps pieces of every thread's requests otherwise."""
    # Only glibc has this function.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Sweeper:
    """Thread that removes uploads and results some time after they were last used.

    Args:
        folder: Folder of gradio's files, used by this process alone.
        belongings: Function that returns the paths of files that are never removed.
        seconds: How long a file is kept after its last use.
        most_bytes: Largest size of all files together in bytes; beyond it the least recently used are removed.
        also: Function called after every round, to remove what is kept in memory.
    """

    def __init__(
        self,
        folder: Path,
        belongings: Callable[[], set[str]],
        seconds: float = KEPT_SECONDS,
        most_bytes: int = MOST_STORED,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.belongings, self.seconds, self.most_bytes = folder, belongings, seconds, most_bytes
        self.also = also
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; remaining files are left in place."""
        self._stop.set()

    def sweep(self) -> None:
        """Remove expired files and empty folders, then the least recently used files until the rest fits the limit."""
        belongings = self.belongings()
        oldest = time.time() - self.seconds
        files = []
        for parent, _, names in os.walk(self.folder, topdown=False):
            # Another thread may have just removed the folder, or put a file there.
            with contextlib.suppress(OSError):
                if Path(parent) != self.folder and not names and os.stat(parent).st_mtime < oldest:
                    os.rmdir(parent)
            for path in (os.path.join(parent, name) for name in names):
                with contextlib.suppress(OSError):
                    if path not in belongings:
                        about = os.stat(path)
                        files.append((max(about.st_mtime, about.st_atime), about.st_size, path))
        stored = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            if used >= oldest and stored <= self.most_bytes:
                break
            stored -= size
            with contextlib.suppress(OSError):
                os.unlink(path)

    def tidy(self) -> None:
        """Remove what is no longer used, on the disk and in memory, and return the memory to the system."""
        self.sweep()
        self.also()
        return_free_memory()

    def _run(self) -> None:
        while not self._stop.wait(min(_SWEEP_SECONDS, self.seconds)):
            self.tidy()
