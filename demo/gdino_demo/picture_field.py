"""The field for one picture: uploaded, taken, pasted, or loaded from a web address."""

from __future__ import annotations

import io

import gradio as gr

from gdino_hf.model.picture_formats import END_BYTES, picture_format

from . import components
from .fetch import fetch
from .request_limits import CheckedImage
from .safety import read_picture

# Formats that browsers show.
_EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "AVIF": ".avif"}


def picture_field(prefix: str) -> CheckedImage:
    """Return the field for a picture; event functions get a `Picture`.

    Args:
        prefix: Beginning of the element id.
    """
    return CheckedImage(
        label="Picture",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        height=300,
        buttons=[],
        elem_id=f"{prefix}-picture",
        alt_text="The picture to search",
    )


def address_field(image: CheckedImage) -> gr.Textbox:
    """Return the field for a web address, beside a button that loads the picture from there.

    Args:
        image: The field that gets the picture.
    """
    with gr.Row(elem_classes="gd-address"):
        address = gr.Textbox(
            label="Picture from a web address",
            placeholder="https://example.org/cat.jpg",
            max_length=2000,
            max_lines=1,
            scale=4,
            min_width=180,
            elem_id=f"{image.elem_id}-address",
        )
        load = gr.Button("Load", scale=1, min_width=70, elem_classes="gd-load")
    gr.on([load.click, address.submit], _load, address, image, api_visibility="private", concurrency_limit=4)
    return address


def _load(address: str) -> str:
    """Download the picture at an address and return the path of the file for the image field."""
    picture = read_picture(fetch(address), address.partition("?")[0])
    extension, data = _EXTENSIONS.get(picture_format(picture.data, picture.data[-END_BYTES:]) or ""), picture.data
    if extension is None:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        extension, data = ".png", buffer.getvalue()
    return components.write_file(f"{picture.name.rsplit('.', 1)[0]}{extension}", data)
