"""Annotated images: boxes and masks with label chips, in one fixed colour per label, drawn with PIL alone."""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

Color = tuple[int, int, int]
Area = tuple[int, int, int, int]

_TINT = round(0.10 * 255)
_MASK_TINT = round(0.45 * 255)
# Rows that are tinted at a time.
_STRIP = 256
# Font size in pixels and number of letters of the texts that are kept, which bound their memory.
_LARGEST_KEPT, _LONGEST_KEPT = 48, 48

# PIL's built-in font covers Latin only. For other scripts, these fonts of common systems are tried in this order.
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
    """Return the colour of a label, which is the same in every image and every run.

    Args:
        label: Any text, compared without case.

    Returns:
        (red, green, blue), each 0..255, bright enough to stand out from a photograph.
    """
    code = int.from_bytes(hashlib.sha256(label.strip().lower().encode()).digest()[:4], "big")
    hue = (code % 360) / 360
    lightness = (0.47, 0.55, 0.63)[(code // 360) % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: Color) -> Color:
    """Return black or white, whichever has the higher WCAG contrast ratio on a background.

    Args:
        background: Background colour (red, green, blue), each 0..255.

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
    colors: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw the detections of one image, the most confident on top.

    Boxes are clipped to the image; a box with a NaN coordinate is left out. Where boxes or masks overlap, the image is
    tinted only once.

    Args:
        image: The image in any mode. Its EXIF orientation is applied, as it was for detection. The image itself is not
            changed.
        result: One entry of `post_process_grounded_object_detection`, with "boxes" (N, 4) xyxy in pixels, "scores"
            (N,) in 0..1 and "text_labels" (N strings), and possibly "masks", (N, height, width) bool, which are tinted
            in place of the boxes; or what the zero-shot pipeline returns for one image.
        show_scores: Whether to write the score after the label.
        font_size: Height of the letters in pixels; None scales it with the image.
        line_width: Width of the box lines in pixels; None scales it with the image.
        colors: "#rrggbb" of labels that have a colour of their own; others get that of `label_color`.

    Returns:
        A new RGB image, upright.

    Raises:
        ValueError: The numbers of boxes, scores and labels differ.
    """
    from .model.option_flags import checked_flag
    from .model.picture_pixels import load_image

    show_scores = checked_flag(show_scores, "show_scores")
    boxes, scores, labels = _detections(result)
    picture = load_image(image)
    # In a very long and narrow image, the narrow side determines the size of the letters.
    scale = min(max(picture.size), 4 * min(picture.size))
    font_size = font_size or max(11, round(scale / 42))
    line_width = line_width or max(2, round(scale / 280))
    order = sorted(
        (index for index, box in enumerate(boxes) if not any(math.isnan(side) for side in box)),
        key=lambda index: scores[index],
    )
    areas = [_area(boxes[index], picture.size) for index in order]
    own = {label: ImageColor.getrgb(color)[:3] for label, color in (colors or {}).items()}
    shades = [own.get(labels[index]) or label_color(labels[index]) for index in order]
    captions = [f"{labels[index]} {scores[index]:.2f}" if show_scores else labels[index] for index in order]
    masks = result.get("masks") if isinstance(result, Mapping) else None
    if masks is not None:
        _tint_masks(picture, [np.asarray(masks[index], dtype=bool) for index in order], shades)
    elif areas:
        _tint(picture, areas, shades)
    draw = ImageDraw.Draw(picture)
    for area, color in zip(areas, shades, strict=True):
        draw.rectangle(area, outline=color, width=line_width)
    taken = np.empty((0, 4))
    for area, caption, color in reversed(list(zip(areas, captions, shades, strict=True))):
        chip = _draw_chip(draw, picture.size, area, caption, color, font_size, taken)
        taken = np.vstack([taken, chip])
    return picture


def _detections(
    result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[list[list[float]], list[float], list[str]]:
    """Return boxes, scores and labels as plain lists from either form of result."""
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


def _area(box: Sequence[float], size: tuple[int, int]) -> Area:
    """Return the first column and row and the last column and row that a box covers inside the image."""
    left, top, right, bottom = (
        round(min(max(side, 0), limit - 1)) for side, limit in zip(box, (*size, *size), strict=True)
    )
    return (min(left, right), min(top, bottom), max(left, right), max(top, bottom))


def _tint(picture: Image.Image, areas: Sequence[Area], colors: Sequence[Color]) -> None:
    """Tint the inside of every box with a tenth of its colour; where boxes overlap, the last one wins.

    The sides of all boxes divide the image into a grid of cells with one colour each. Boxes are painted on that small
    grid and the image is blended once, so that hundreds of large boxes take hardly longer than one.
    """
    firsts = np.array(areas).reshape(-1, 2, 2)[:, 0]
    ends = np.array(areas).reshape(-1, 2, 2)[:, 1] + 1
    columns, rows = (np.unique([firsts[:, axis], ends[:, axis]]) for axis in (0, 1))
    cells = np.zeros((len(rows) - 1, len(columns) - 1), dtype=np.intp)
    for number, (left, top, right, bottom) in enumerate(
        zip(
            np.searchsorted(columns, firsts[:, 0]),
            np.searchsorted(rows, firsts[:, 1]),
            np.searchsorted(columns, ends[:, 0]),
            np.searchsorted(rows, ends[:, 1]),
            strict=True,
        ),
        start=1,
    ):
        cells[top:bottom, left:right] = number
    palette = np.array([(0, 0, 0, 0), *((*color, _TINT) for color in colors)], dtype=np.uint8)
    row_of = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
    # A strip of rows at a time, because a layer for the whole of a large photograph would take twice its memory.
    for top in range(0, len(row_of), _STRIP):
        strip = palette[cells[row_of[top : top + _STRIP]]].repeat(np.diff(columns), axis=1)
        layer = Image.fromarray(strip)
        picture.paste(layer, (int(columns[0]), int(rows[0]) + top), mask=layer)


def _tint_masks(picture: Image.Image, masks: Sequence[np.ndarray], colors: Sequence[Color]) -> None:
    """Tint the pixels of every mask with its colour; where masks overlap, the last one wins."""
    palette = np.array([(0, 0, 0, 0), *((*color, _MASK_TINT) for color in colors)], dtype=np.uint8)
    for top in range(0, picture.height, _STRIP):
        numbers = np.zeros((min(_STRIP, picture.height - top), picture.width), dtype=np.intp)
        for number, mask in enumerate(masks, start=1):
            numbers[mask[top : top + _STRIP]] = number
        layer = Image.fromarray(palette[numbers])
        picture.paste(layer, (0, top), mask=layer)


def _draw_chip(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Area,
    caption: str,
    color: Color,
    font_size: int,
    taken: np.ndarray,
) -> tuple[float, float, float, float]:
    """Draw a filled label at a corner of the box, inside the image and, if possible, beside all other labels."""
    pad = max(2, font_size // 4)
    # The score changes from frame to frame of a video, the label does not.
    words = (caption,) if _script(caption) else caption.rpartition(" ")[::2]
    letters = [_letters(text, font_size) for text in words if text]
    gap = _letters("a b", font_size).width - _letters("ab", font_size).width
    text_width = sum(each.width for each in letters) + gap * max(len(letters) - 1, 0)
    # Fixed letters determine the line height, so that all chips of an image are equally high.
    line = _letters("Ag|", font_size)
    top_of_text = min(each.top for each in (line, *letters))
    bottom_of_text = max(each.bottom for each in (line, *letters))
    width = text_width + 2 * pad
    height = bottom_of_text - top_of_text + pad
    left = min(box[0], max(size[0] - width, 0))
    right_aligned = min(max(box[2] - width, 0), max(size[0] - width, 0))
    places = [
        (left, box[1] - height),
        (left, box[1]),
        (right_aligned, box[1] - height),
        (right_aligned, box[1]),
        (left, box[3]),
        (left, box[3] - height),
    ]
    places = [(x, y) for x, y in places if 0 <= y <= size[1] - height] or [(left, box[1])]
    free = (place for place in places if not _overlaps_any((*place, place[0] + width, place[1] + height), taken))
    x, y = (round(value) for value in next(free, places[0]))
    draw.rounded_rectangle((x, y, x + width, y + height), radius=pad, fill=color)
    across = x + pad
    for each in letters:
        draw.bitmap((across, y + pad // 2 + each.top - top_of_text), each.mask, fill=text_color(color))
        across += each.width + gap
    return (x, y, x + width, y + height)


@dataclass(frozen=True)
class _Letters:
    """A drawn text.

    Attributes:
        mask: How much of each pixel it covers.
        top, bottom: First row and row after the last, in pixels below the top of the line.
    """

    mask: Image.Image
    top: int
    bottom: int

    @property
    def width(self) -> int:
        return self.mask.width


def _letters(text: str, font_size: int) -> _Letters:
    """Draw a text. Small ones, as in the frames of a video, are kept: nothing else in a frame takes as long."""
    is_small = font_size <= _LARGEST_KEPT and len(text) <= _LONGEST_KEPT
    return _kept_letters(text, font_size) if is_small else _drawn_letters(text, font_size)


def _drawn_letters(text: str, font_size: int) -> _Letters:
    font = _font(font_size, _script(text))
    area = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    left, top, right, bottom = math.floor(area[0]), math.floor(area[1]), math.ceil(area[2]), math.ceil(area[3])
    mask = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(mask).text((-left, -top), text, font=font, fill=255)
    return _Letters(mask, top, bottom)


_kept_letters = lru_cache(maxsize=512)(_drawn_letters)


def _overlaps_any(area: tuple[float, float, float, float], others: np.ndarray) -> bool:
    left, top, right, bottom = area
    apart = (others[:, 2] <= left) | (right <= others[:, 0]) | (others[:, 3] <= top) | (bottom <= others[:, 1])
    return not apart.all()


def _script(text: str) -> str:
    """Return the distinct non-ASCII characters of a text, which the choice of font depends on."""
    return "".join(sorted({character for character in text if ord(character) > 0x7E}))


@lru_cache(maxsize=256)
def _font(size: int, characters: str) -> Any:
    """Return the font that has most of the characters, preferring PIL's built-in one."""
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
