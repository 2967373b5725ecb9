"""Tools for agents, by the Model Context Protocol: pictures by address or inside of the message, answers as JSON."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from . import components, render
from .components import PageState
from .fetch import fetch
from .queries import Query, read_caption, read_query
from .safety import LARGEST_PICTURE, MEGABYTE, Picture, Refused, read_picture

MISSING = 'tools for agents need the package mcp; install it with pip install "gdino-hf[demo]".'
MOST_CALLS = 8
"""Calls of tools that may wait for a model at once; each holds a thread of the server."""


def available() -> bool:
    """Return whether the package that gradio's MCP server needs is installed."""
    return importlib.util.find_spec("mcp") is not None


def build(state: PageState) -> None:
    """Create the tools `detect` and `ground`.

    Args:
        state: The state of the page.
    """
    picture = gr.Textbox(label="Picture", visible=False)
    labels = gr.Textbox(label="Labels", visible=False)
    caption = gr.Textbox(label="Caption", visible=False)
    negatives = gr.Textbox("", label="Negative labels", visible=False)
    model, tiles, nms = components.model_field(state), components.tiles_field(), components.nms_field(state)
    threshold, reading = components.threshold_field(state.threshold), components.reading_field(state)
    for hidden in (model, tiles, nms, threshold, reading):
        hidden.visible = False
    places = threading.BoundedSemaphore(MOST_CALLS)

    def answer(picture: str, query: Query, model: str, threshold: float, nms: float) -> str:
        with _place(places):
            outputs = state.models.run(model, picture_of(picture), query)
            settings = components.read_settings(threshold, nms)
            return json.dumps(render.report(outputs, outputs.detections(settings), settings), ensure_ascii=False)

    # gradio reads one line for each argument.
    def detect(
        picture: str, labels: str, negatives: str, threshold: float, tiles: float, nms: float, model: str
    ) -> str:
        """Find objects in a picture by the words for them, and return their boxes.

        The answer is JSON. "detections" has the label, the score from 0 to 1 and the box of each object, best first;
        a box is [left, top, right, bottom] in pixels. "presence" has the highest score of each label, found or not.

        Args:
            picture: http(s) address of the picture on the public internet, or its content as a base64 data: URL.
            labels: Things to find, such as "cat, remote control". Other names for one: "cat: cat, kitten; dog".
            negatives: Similar things that are not meant, such as "toy cat". Boxes that fit them better are left out.
            threshold: Score from 0 to 1 that a box must exceed. Lower it to see what "presence" says is close.
            tiles: 0, or the side in pixels of squares to search too, for things that are small in a large picture.
            nms: Overlap (IoU) from 0 to 1 above which only the better of two boxes of one label stays; 1 keeps all.
            model: Name of the model.
        """
        return answer(picture, read_query(labels, negatives, tiles=tiles), model, threshold, nms)

    def ground(picture: str, caption: str, threshold: float, nms: float, reading: str, model: str) -> str:
        """Find the things that a sentence about a picture names, and return the boxes of each phrase.

        The answer is JSON as from the tool "detect". The labels are the phrases, and "spans" has the characters of
        the phrase in the sentence.

        Args:
            picture: http(s) address of the picture on the public internet, or its content as a base64 data: URL.
            caption: A sentence such as "a man holding a red cup".
            threshold: Score from 0 to 1 that a box must exceed. Lower it to see what "presence" says is close.
            nms: Overlap (IoU) from 0 to 1 above which only the better of two boxes of a phrase stays; 1 keeps all.
            reading: What the model reads; each phrase by itself suits models that know names but no sentences.
            model: Name of the model.
        """
        return answer(picture, read_caption(caption, reading), model, threshold, nms)

    _offer(detect, [picture, labels, negatives, threshold, tiles, nms, model])
    _offer(ground, [picture, caption, threshold, nms, reading, model])


def picture_of(text: str | None) -> Picture:
    """Return the picture that an agent names or sends.

    Args:
        text: http(s) address of a picture, or a data: URL with its content in base64.

    Returns:
        The checked picture.

    Raises:
        Refused: The text is neither, or the picture cannot be used.
    """
    text = (text or "").strip()
    if text[:5].lower() != "data:":
        return read_picture(fetch(text), text.partition("?")[0])
    head, comma, code = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused("The data: URL does not hold base64; send data:image/jpeg;base64, and the content of the file.")
    if len(code) > LARGEST_PICTURE * 4 // 3 + 4:
        raise Refused(f"The picture has more than {LARGEST_PICTURE // MEGABYTE} MB; make it smaller.")
    try:
        return read_picture(base64.b64decode(code, validate=True))
    except binascii.Error as error:
        raise Refused("The data: URL is not valid base64; encode the content of the file again.") from error


@contextmanager
def _place(places: threading.Semaphore) -> Iterator[None]:
    """Take one of the places for calls, or refuse the call."""
    if not places.acquire(blocking=False):
        raise Refused(f"{MOST_CALLS} other calls are waiting for a model; try again in a few seconds.")
    try:
        yield
    finally:
        places.release()


def _offer(function: Callable[..., str], inputs: list[Any]) -> None:
    """Offer a function as a tool of its name, and to other programs as an endpoint."""
    result = gr.Textbox(visible=False, label="Result")
    trigger = gr.Button(visible=False)
    # Not queued: gradio would send a queued call to itself over HTTP, and hold a second thread meanwhile.
    tool = gr.mcp.tool()(function)
    trigger.click(tool, inputs, result, api_name=f"tool_{function.__name__}", api_visibility="public", queue=False)
