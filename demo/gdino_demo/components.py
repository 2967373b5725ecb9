"""What the tabs share: the state of the page, and the fields that look the same on each of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from .engine import Kept, Models, Settings
from .guard import GuardedSlider
from .render import FIGURE_TEMPLATE
from .safety import parse_labels, parse_phrases

EVERY, GROUND = "Find every label", "Ground the phrases of a sentence"

# Whatever runs a model waits in one line; a GPU or all cores are used by one forward anyway.
RUNS_A_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
# Filtering kept outputs takes milliseconds; of many moves of a slider the last one counts.
FILTERS: dict[str, Any] = {"concurrency_limit": 8, "show_progress": "hidden", "trigger_mode": "always_last"}

GONE = """<div class="gd-status" role="status"><p>What the model found is no longer kept, so that nothing
changes here; start it again.</p></div>"""

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
class Desk:
    """What the page works with.

    Attributes:
        models: Those that can be chosen.
        threshold: Where the sliders begin.
        nms: The same.
        kept: Outputs of the last requests.
        examples: Photographs and labels to begin with.
    """

    models: Models
    threshold: float
    nms: float
    kept: Kept = field(default_factory=Kept)
    examples: list[list[str]] = field(default_factory=list)


def read_query(labels: str, negatives: str, mode: str) -> tuple[list[str], list[str]]:
    """What to look for and what competes, out of the fields of a tab.

    Args:
        labels: A comma list or a sentence.
        negatives: A comma list, or nothing.
        mode: `EVERY` or `GROUND`.

    Returns:
        Labels and negative labels.

    Raises:
        Refused: One of them cannot be used.
    """
    wanted = parse_phrases(labels) if mode == GROUND else parse_labels(labels)
    return wanted, parse_labels(negatives, required=False)


def read_settings(
    threshold: float, nms: float, text_threshold: float = 0.0, hidden: frozenset[str] = frozenset()
) -> Settings:
    """Settings out of the fields of a tab."""
    return Settings(
        threshold=float(threshold),
        nms=float(nms),
        text_threshold=float(text_threshold),
        hidden=hidden,
    )


def model_field(desk: Desk, label: str = "Model", index: int = 0) -> gr.Dropdown:
    """The models of the page."""
    names = desk.models.names
    return gr.Dropdown(names, value=names[min(index, len(names) - 1)], label=label, filterable=False)


def labels_field(value: str = "cat, person, cup", label: str = "Labels") -> gr.Textbox:
    """Where labels are typed."""
    info = 'Separated by commas, or a sentence with periods: "a cat. a remote control."'
    return gr.Textbox(value=value, label=label, info=info, max_length=4000, lines=1, max_lines=4)


def negatives_field() -> gr.Textbox:
    """Where labels that compete are typed."""
    info = "Optional: what looks alike but is not meant; these take boxes and are left out."
    return gr.Textbox(value="", label="Negative labels", info=info, max_length=4000, max_lines=4)


def threshold_field(desk: Desk) -> gr.Slider:
    """The lowest score."""
    info = "Only boxes with a higher score."
    return GuardedSlider(0, 1, value=desk.threshold, step=0.01, label="Score threshold", info=info)


def nms_field(desk: Desk) -> gr.Slider:
    """The highest overlap."""
    info = "Of two boxes of a label that overlap more, the better stays; 1 keeps both."
    return GuardedSlider(0, 1, value=desk.nms, step=0.01, label="Overlap limit (NMS)", info=info)


def html_field(elem_id: str, value: str = "") -> gr.HTML:
    """Where a status or a table is shown, in the style of the page and not of a text."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, js_on_load=None)


def figure_field(elem_id: str, label: str) -> gr.HTML:
    """Where a photograph and its boxes are shown."""
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
    """A file to download, in the page's own folder, from where it is removed after a while.

    Args:
        name: What the visitor's browser calls it.
        content: Text or bytes.

    Returns:
        Its path.
    """
    path = Path(get_upload_folder()) / secrets.token_hex(16) / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def download_button(label: str, make: Callable[..., str], inputs: list[Any], elem_id: str) -> gr.Button:
    """A button that makes a file when it is pressed, and not before.

    Args:
        label: On the button.
        make: From the values of the inputs to the path of the file.
        inputs: Components.
        elem_id: Of the button.

    Returns:
        The button.
    """
    button = gr.Button(label, size="sm", min_width=90, elem_id=elem_id)
    file = gr.File(visible="hidden", label=label)
    made = button.click(make, inputs, file, api_visibility="private", concurrency_limit=4, show_progress="hidden")
    made.success(None, file, None, js=_SAVE, api_visibility="private")
    return button


def endpoint(function: Callable[..., Any], inputs: list[Any], name: str) -> None:
    """An address for programs: the fields of a tab in, JSON out, described by the function's docstring.

    Args:
        function: What runs; its parameters' names are the endpoint's.
        inputs: Components, whose first values are the defaults.
        name: Of the endpoint.
    """
    result = gr.JSON(visible=False, label="Result")
    trigger = gr.Button(visible=False)
    trigger.click(function, inputs, result, api_name=name, api_visibility="public", **RUNS_A_MODEL)
