"""Annotated pictures: boxes and label chips on a photograph, one stable colour per label, drawn with PIL alone."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Area = tuple[float, float, float, float]

# PIL's own font is Latin. For other scripts, what common systems have is tried in this order.
_OTHER_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "arial.ttf",
    "unifont.otf",
)
_NOT_A_CHARACTER = "\U0010ffff"


def label_color(label: str) -> Color:
    """The colour of a label: the same in every picture and every run.

    Args:
        label: Any text; upper and lower case are one label.

    Returns:
        (red, green, blue), each 0..255, bright enough to stand out from a photograph.
    """
    code = int.from_bytes(hashlib.sha256(label.strip().lower().encode()).digest()[:4], "big")
    hue = (code % 360) / 360
    lightness = (0.47, 0.55, 0.63)[(code // 360) % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: Color) -> Color:
    """Black or white, whichever has the higher WCAG contrast ratio on the given background.

    Args:
        background: (red, green, blue), each 0..255.

    Returns:
        (0, 0, 0) or (255, 255, 255).
    """
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def draw_detections(
    image: Image.Image,
    result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    show_scores: bool = True,
    font_size: int | None = None,
    line_width: int | None = None,
) -> Image.Image:
    """Draw the detections of one image, the most confident on top.

    Args:
        image: The photograph, any mode; turned as its EXIF orientation says, as it was for the detector. The original
            is not changed.
        result: One entry of `post_process_grounded_object_detection`, with "boxes" (N, 4) xyxy in pixels, "scores"
            (N,) in 0..1 and "text_labels" (N strings); or what the zero-shot pipeline returns for one image.
        show_scores: Write the score after the label.
        font_size: Height of the letters in pixels; None scales with the picture.
        line_width: Width of the box lines in pixels; None scales with the picture.

    Returns:
        A new RGB picture of the upright size.

    Raises:
        ValueError: The numbers of boxes, scores and labels differ.
    """
    from .model.image_processing_gdino import load_image

    boxes, scores, labels = _detections(result)
    picture = load_image(image)
    # A ribbon of a picture gets the letters of its narrow side.
    scale = min(max(picture.size), 4 * min(picture.size))
    font_size = font_size or max(11, round(scale / 42))
    line_width = line_width or max(2, round(scale / 280))
    order = sorted(range(len(boxes)), key=lambda index: scores[index])
    for index in order:
        _draw_box(picture, boxes[index], label_color(labels[index]), line_width)
    draw = ImageDraw.Draw(picture)
    taken: list[Area] = []
    for index in reversed(order):
        caption = f"{labels[index]} {scores[index]:.2f}" if show_scores else labels[index]
        taken.append(
            _draw_chip(draw, picture.size, boxes[index], caption, label_color(labels[index]), font_size, taken)
        )
    return picture


def _detections(
    result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[list[list[float]], list[float], list[str]]:
    """Boxes, scores and labels as plain lists from either form of result."""
    if isinstance(result, Mapping):
        boxes = [[float(x) for x in box] for box in result["boxes"]]
        scores = [float(score) for score in result["scores"]]
        labels = [str(label) for label in result["text_labels"]]
    else:
        boxes = [[float(found["box"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for found in result]
        scores = [float(found["score"]) for found in result]
        labels = [str(found["label"]) for found in result]
    if not len(boxes) == len(scores) == len(labels):
        raise ValueError(
            f"A result needs as many scores and labels as boxes, got {len(boxes)} boxes, {len(scores)} scores and "
            f"{len(labels)} labels; pass one entry of post_process_grounded_object_detection unchanged."
        )
    return boxes, scores, labels


def _draw_box(picture: Image.Image, box: Sequence[float], color: Color, line_width: int) -> None:
    """A tinted rectangle with a solid line whose outer edge is the box."""
    width, height = picture.size
    left, right = sorted((min(max(round(box[0]), 0), width - 1), min(max(round(box[2]), 0), width - 1)))
    top, bottom = sorted((min(max(round(box[1]), 0), height - 1), min(max(round(box[3]), 0), height - 1)))
    inside = (left, top, right + 1, bottom + 1)
    region = picture.crop(inside)
    picture.paste(Image.blend(region, Image.new("RGB", region.size, color), 0.10), inside)
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=color, width=line_width)


def _draw_chip(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    caption: str,
    color: Color,
    font_size: int,
    taken: Sequence[Area],
) -> Area:
    """A filled label at the box's corner, where it is inside the picture and covers no other label if possible."""
    font = _font(font_size, _script(caption))
    pad = max(2, font_size // 4)
    text_left, text_top, text_right, text_bottom = draw.textbbox((0, 0), caption, font=font)
    # The line height comes from fixed letters so that every chip of a picture is equally high.
    _, line_top, _, line_bottom = draw.textbbox((0, 0), "Ag|", font=font)
    top_of_text, bottom_of_text = min(text_top, line_top), max(text_bottom, line_bottom)
    width = text_right - text_left + 2 * pad
    height = bottom_of_text - top_of_text + pad
    left = min(max(box[0], 0), max(size[0] - width, 0))
    right_aligned = min(max(box[2] - width, 0), max(size[0] - width, 0))
    places = [
        (left, box[1] - height),
        (left, box[1]),
        (right_aligned, box[1] - height),
        (right_aligned, box[1]),
        (left, box[3]),
        (left, box[3] - height),
    ]
    places = [(x, y) for x, y in places if 0 <= y <= size[1] - height] or [(left, min(max(box[1], 0), size[1]))]
    free = [(x, y) for x, y in places if not any(_overlap((x, y, x + width, y + height), other) for other in taken)]
    x, y = (round(value) for value in (free or places)[0])
    draw.rounded_rectangle((x, y, x + width, y + height), radius=pad, fill=color)
    draw.text((x + pad - text_left, y + pad / 2 - top_of_text), caption, font=font, fill=text_color(color))
    return (x, y, x + width, y + height)


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _script(text: str) -> str:
    """The characters beyond Latin, on which the choice of font depends."""
    return "".join(sorted({character for character in text if ord(character) > 0x7E}))


@lru_cache(maxsize=256)
def _font(size: int, characters: str) -> Any:
    """The font that has most of the characters; PIL's own where it does as well as any other."""
    candidates = [ImageFont.load_default(size)]
    for name in _OTHER_FONTS if characters else ():
        try:
            candidates.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return max(candidates, key=lambda font: _number_drawn(font, characters))


def _number_drawn(font: Any, characters: str) -> int:
    missing = bytes(font.getmask(_NOT_A_CHARACTER))
    return sum(bytes(font.getmask(character)) != missing for character in characters)
