"""Limits of time: request bodies and answers must move on, and connections that ask for nothing are closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from typing import Any

import gradio as gr

from .gradio_internals import Connection, connections_of

MESSAGE_SECONDS = 30.0
"""Longest time for the body of a message to arrive."""
UPLOAD_SECONDS = 300.0
"""Longest time for an upload to arrive."""
ANSWER_SECONDS = 60.0
"""Longest time that a client may take to accept one piece of an answer."""
WAITING_SECONDS = 20.0
"""Longest time that a connection may stay open without a complete request."""

_WATCH_SECONDS = 1.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooSlowError(Exception):
    """A client sends or accepts data too slowly."""


def within(receive: Receive, seconds: float) -> Receive:
    """Return a `receive` that lets a request's body take a limited time in all.

    Args:
        receive: The function of the server.
        seconds: Longest time until the body is complete; what follows, such as the client's end, may take any time.

    Returns:
        A function that raises TooSlowError if the body takes longer.
    """
    deadline = time.monotonic() + seconds
    complete = False

    async def receive_in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.01))
        except asyncio.TimeoutError:
            raise TooSlowError from None
        complete = not message.get("more_body", False)
        return message

    return receive_in_time


def accepted(send: Send, seconds: float = ANSWER_SECONDS) -> Send:
    """Return a `send` that gives up if a client does not accept a piece of the answer in time."""

    async def send_in_time(message: Message) -> None:
        try:
            await asyncio.wait_for(send(message), seconds)
        except asyncio.TimeoutError:
            raise TooSlowError from None

    return send_in_time


class ConnectionWatcher:
    """Thread that closes connections which stay without a complete request, or do not end.

    Args:
        app: The page.
        seconds: How long a connection may wait.
    """

    def __init__(self, app: gr.Blocks, seconds: float = WAITING_SECONDS) -> None:
        self.app, self.seconds = app, seconds
        self._since: dict[Hashable, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def watch(self, now: float) -> list[Connection]:
        """Close the connections that waited too long.

        Args:
            now: Time in seconds of any clock that only moves forward.

        Returns:
            The connections that were closed.
        """
        waiting = {connection.state: connection for connection in connections_of(self.app) if connection.waits}
        self._since = {state: self._since.get(state, now) for state in waiting}
        late = [connection for state, connection in waiting.items() if now - self._since[state] >= self.seconds]
        for connection in late:
            connection.close()
        return late

    def _run(self) -> None:
        while not self._stop.wait(min(_WATCH_SECONDS, self.seconds / 4)):
            self.watch(time.monotonic())
