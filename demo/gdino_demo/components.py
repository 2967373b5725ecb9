"""Components that the tabs share, and the state of the page."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from .engine import Models
from .formats import FORMAT_NAMES
from .gradio_internals import upload_folder
from .masks import OFF
from .outputs import KeptOutputs, Settings
from .queries import PHRASES, WHOLE
from .render import FIGURE_TEMPLATE
from .request_limits import CheckedSlider
from .safety import LONGEST_TEXT

# Requests that run a model wait in one queue, because one forward pass already uses the GPU or all cores.
RUNS_A_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# Filtering stored outputs takes milliseconds; of several quick moves of a slider only the last is answered.
FILTERS: dict[str, Any] = {"concurrency_limit": 8, "show_progress": "hidden", "trigger_mode": "always_last"}

GONE = """<div class="gd-status" role="status"><p>These results are no longer kept, so the settings have no effect; run
the model again.</p></div>"""

_SAVE = """(file) => {
    if (!file) return;
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name;
    document.body.append(link);
    link.click();
    link.remove();
}"""


@dataclass
class PageState:
    """The models, defaults and stored outputs of a page.

    Attributes:
        models: Models that visitors can choose.
        threshold: Initial score threshold, in 0..1.
        reading: How models read captions at first, one of `queries.WHOLE` and `queries.PHRASES`.
        nms: Initial IoU limit of non-maximum suppression, in 0..1.
        kept: Outputs of recent requests.
        examples: Pairs of a picture's path and labels, offered as examples.
        caption_examples: Pairs of a picture's path and a caption, offered as examples.
    """

    models: Models
    threshold: float
    nms: float
    reading: str
    kept: KeptOutputs = field(default_factory=KeptOutputs)
    examples: list[list[str]] = field(default_factory=list)
    caption_examples: list[list[str]] = field(default_factory=list)


def read_settings(
    threshold: float, nms: float, text_threshold: float = 0.0, hidden: frozenset[str] = frozenset()
) -> Settings:
    """Return the settings that the fields of a tab describe."""
    return Settings(
        threshold=float(threshold),
        nms=float(nms),
        text_threshold=float(text_threshold),
        hidden=hidden,
    )


def model_field(state: PageState, label: str = "Model", index: int = 0) -> gr.Dropdown:
    """Return the menu of models."""
    names = state.models.names
    return gr.Dropdown(names, value=names[min(index, len(names) - 1)], label=label, filterable=False)


def masks_fields(state: PageState, info: str = "Also makes the mask of each box that is shown.") -> list[gr.Dropdown]:
    """Return the menu of segmenters as the only item of a list, which is empty if the page has none."""
    names = state.models.segmenters
    if not names:
        return []
    return [
        gr.Dropdown([OFF, *names], value=OFF, label="Masks", info=info, filterable=False, elem_classes="gd-masks-field")
    ]


def labels_field(value: str = "cat, person, cup", label: str = "Labels") -> gr.Textbox:
    """Return the field for labels."""
    info = 'For example "cat, remote control". Several names for one thing: "cat: cat, kitten; dog: dog, puppy".'
    return gr.Textbox(value=value, label=label, info=info, max_length=LONGEST_TEXT, lines=1, max_lines=6)


def negatives_field() -> gr.Textbox:
    """Return the field for negative labels."""
    info = "Optional: similar things you do not mean. Boxes that fit them better are left out."
    return gr.Textbox(value="", label="Negative labels", info=info, max_length=LONGEST_TEXT, max_lines=4)


def tiles_field() -> gr.Slider:
    """Return the slider of the tiles' size."""
    info = (
        "For small things in a large picture: also looks at overlapping squares of this many pixels, which takes "
        "longer. 0 looks at the whole picture only."
    )
    return CheckedSlider(0, 2000, value=0, step=100, label="Tiles", info=info)


def threshold_field(value: float) -> gr.Slider:
    """Return the slider of the score threshold."""
    info = "Show only boxes with a higher score."
    return CheckedSlider(0, 1, value=value, step=0.01, label="Score threshold", info=info)


def nms_field(state: PageState) -> gr.Slider:
    """Return the slider of the overlap limit."""
    info = "If two boxes of one label overlap more than this (IoU), only the better one stays; 1 keeps all."
    return CheckedSlider(0, 1, value=state.nms, step=0.01, label="Overlap limit (NMS)", info=info)


def format_field(elem_id: str) -> gr.Dropdown:
    """Return the menu of file formats, those of `gdino detect --format`."""
    return gr.Dropdown(
        list(FORMAT_NAMES), value="coco", label="File format", filterable=False, container=False, min_width=120,
        elem_id=elem_id,
    )  # fmt: skip


def reading_field(state: PageState) -> gr.Radio:
    """Return the choice of how a model reads a caption."""
    info = "Models that were trained on captions read the whole; gdino-nano knows names and finds phrases one by one."
    return gr.Radio([WHOLE, PHRASES], value=state.reading, label="What the model reads", info=info)


def html_field(elem_id: str, value: str = "") -> gr.HTML:
    """Return an element for a status or a table, styled by the page and not as prose."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, js_on_load=None)


def figure_field(elem_id: str, label: str) -> gr.HTML:
    """Return the element that shows a picture and its boxes."""
    return gr.HTML(
        "",
        html_template=FIGURE_TEMPLATE,
        picture="",
        ratio=1,
        label=label,
        elem_id=elem_id,
        apply_default_css=False,
        js_on_load=None,
    )


def write_file(name: str, content: str | bytes) -> str:
    """Write a file to download to the page's folder, from which it is removed after some time.

    Args:
        name: File name that the browser shows.
        content: Text or bytes of the file.

    Returns:
        Path of the file.
    """
    path = new_folder() / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def new_folder() -> Path:
    """Return a new folder for files to download, in the page's folder."""
    folder = upload_folder() / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


def download_button(label: str, make: Callable[..., str], inputs: list[Any], elem_id: str) -> gr.Button:
    """Return a button that makes and downloads a file when it is pressed.

    Args:
        label: Text on the button.
        make: Function from the values of the inputs to the path of the file.
        inputs: Components whose values `make` gets.
        elem_id: Element id of the button.

    Returns:
        The button.
    """
    button = gr.Button(label, size="sm", min_width=90, elem_id=elem_id)
    file = gr.File(visible="hidden", label=label)
    made = button.click(make, inputs, file, api_visibility="private", concurrency_limit=4, show_progress="hidden")
    made.success(None, file, None, js=_SAVE, api_visibility="private")
    return button


def endpoint(function: Callable[..., Any], inputs: list[Any], name: str) -> None:
    """Add an API endpoint that takes the fields of a tab and returns JSON.

    Args:
        function: Function to run; its parameter names and docstring are those of the endpoint.
        inputs: Components whose initial values are the endpoint's defaults.
        name: Name of the endpoint, without slash.
    """
    result = gr.JSON(visible=False, label="Result")
    trigger = gr.Button(visible=False)
    trigger.click(function, inputs, result, api_name=name, api_visibility="public", **RUNS_A_MODEL)
