"""The border of the server: what is refused before gradio reads it, and errors that say what happened."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import component_meta
from gradio.exceptions import InvalidPathError
from gradio.utils import get_upload_folder

from .safety import KEPT_SECONDS, LARGEST_REQUEST, MEGABYTE, Refused, read_picture

logger = logging.getLogger(__name__)

# Files of all visitors together.
MOST_STORED = 2 * 2**30
_SWEEP_SECONDS = 20
_LARGEST_MESSAGE = MEGABYTE
_NOT_UPLOADED = "This file was not uploaded to this page; upload it."
# Multipart bodies carry a little more than the file.
_MARGIN = 64 * 1024

# gradio writes a stub beside every module that defines a component: into site-packages, and never the same as the code.
component_meta.create_or_modify_pyi = lambda *_: None

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Border:
    """ASGI middleware: bodies have a declared and bounded size, and the server fetches nothing for anyone.

    gradio would pass on web addresses given as file names, and takes files inside of messages; pictures come through
    the upload or through `fetch`, which have limits of their own.

    Args:
        app: What runs behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """One connection."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, sentence = refusal
        await self._drain(scope, receive)
        body = sentence.encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    async def _drain(scope: _Message, receive: _Receive) -> None:
        """Read and forget a body that is nearly right, so that its sender reads the answer instead of an error."""
        size = int(dict(scope["headers"]).get(b"content-length", b"0") or 0)
        if size > 4 * LARGEST_REQUEST:
            return
        while size > 0:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    @staticmethod
    def _refusal(scope: _Message) -> tuple[int, str] | None:
        path: str = scope["path"]
        for fetched in ("/file=http:", "/file=https:", "/proxy=", "/process_recording"):
            if fetched in path.lower():
                return 403, "This server opens no web addresses in this way; use the field for addresses on the page."
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers or not headers.get(b"content-length", b"0").isdigit():
            return 411, "The size of the request is not declared; send a Content-Length."
        size = int(headers.get(b"content-length", b"0"))
        limit = LARGEST_REQUEST + _MARGIN if path.rstrip("/").endswith("/upload") else _LARGEST_MESSAGE
        if size > limit:
            return 413, f"The request has {size // MEGABYTE} MB; at most {limit // MEGABYTE} MB are taken at once."
        return None


class GuardedBlocks(gr.Blocks):
    """Blocks whose every failure is a plain sentence for the visitor and a line in the log for the host."""

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in gradio, with its own errors translated."""
        try:
            return await super().process_api(*args, **kwargs)
        except Refused:
            raise
        except InvalidPathError:
            raise Refused(_NOT_UPLOADED) from None
        except gr.Error as error:
            raise Refused(str(error.message)) from error
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, Refused):
                raise cause from None
            logger.exception("A request failed")
            raise Refused("Something went wrong while working on this; the page goes on, try again.") from error


class _NoDownloads:
    """A component that takes files of the upload folder and no web addresses."""

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        """As in gradio, which would download an address without a limit of size or time."""
        if str(url_or_file_path or "").lower().startswith(("http:", "https:")):
            raise Refused("Files are not fetched from web addresses here; upload it or use the field for addresses.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]

    def get_block_name(self) -> str:
        """What the browser shows it as: the component it guards."""
        guarded = next(each for each in type(self).__mro__ if each.__module__.startswith("gradio."))
        return guarded.__name__.lower()

    get_block_class = get_block_name


class GuardedSlider(gr.Slider):
    """A number in a range; a field that was emptied, or another program's mistake, is named."""

    def preprocess(self, payload: Any) -> Any:
        """The number."""
        number = payload if isinstance(payload, (int, float)) and not isinstance(payload, bool) else math.nan
        if not self.minimum <= number <= self.maximum:
            raise Refused(f"{self.label} must be a number from {self.minimum} to {self.maximum}; choose one.")
        return number

    def get_block_name(self) -> str:
        """What the browser shows it as."""
        return "slider"

    get_block_class = get_block_name


class GuardedImage(_NoDownloads, gr.Image):
    """An image field whose file is checked before it is decoded; functions get a `Picture`."""

    def preprocess(self, payload: Any) -> Any:
        """The checked picture, or None."""
        if payload is None:
            return None
        return read_picture(_own(payload.path), payload.orig_name or Path(payload.path).name)


class GuardedFiles(_NoDownloads, gr.File):
    """A field of many files; functions get (path, name) pairs and read them one at a time."""

    def preprocess(self, payload: Any) -> Any:
        """Pairs of path and name."""
        files = getattr(payload, "root", payload) or []
        files = files if isinstance(files, list) else [files]
        return [(_own(file.path), file.orig_name or Path(file.path).name) for file in files]


class GuardedVideo(_NoDownloads, gr.Video):
    """A video field; functions get the path, and no program is run over the file before they check it."""

    def preprocess(self, payload: Any) -> Any:
        """The path, or None."""
        return None if payload is None else _own(payload.path)


def _own(path: str | None) -> str:
    """The path of a file that was uploaded to this page."""
    if not path:
        raise Refused("Files are not taken from inside a message; upload the file.")
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise Refused(_NOT_UPLOADED)
    return path


class Sweeper:
    """Removes what was uploaded or made, a while after it was last used.

    Args:
        folder: The folder of gradio's files, of this process alone.
        app: The page; pictures that belong to it stay.
        seconds: How long a file lives.
        most_bytes: Of all files together; those that were not used for longest go.
        also: Called at every turn, to forget what is not in files.
    """

    def __init__(
        self,
        folder: Path,
        app: gr.Blocks,
        seconds: float = KEPT_SECONDS,
        most_bytes: int = MOST_STORED,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.app, self.seconds, self.most_bytes, self.also = folder, app, seconds, most_bytes, also
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; files stay for whoever removes the folder."""
        self._stop.set()

    def sweep(self) -> None:
        """Remove every file that is old enough, then the oldest if all take too much room, and folders left empty."""
        belongings = {str(Path(path)) for block in self.app.blocks.values() for path in _kept_for_ever(block)}
        oldest = time.time() - self.seconds
        files = []
        for parent, _, names in os.walk(self.folder, topdown=False):
            # Another thread may have just removed it, or be using the folder.
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

    def _run(self) -> None:
        while not self._stop.wait(min(_SWEEP_SECONDS, self.seconds)):
            self.sweep()
            self.also()


def _kept_for_ever(block: Any) -> set[str]:
    return getattr(block, "keep_in_cache", None) or set()
