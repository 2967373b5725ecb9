"""XML formats: Pascal VOC, one document a picture, and CVAT for images 1.1, one document for all pictures.

XML 1.0 cannot hold most control characters; they are written as escapes such as \\x1b, and reading with `names` gives
the label back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from ..data.voc_document import SIDES, VOC_OFFSET, as_number, parse_xml, voc_objects, xml_number
from .exchange_values import box_table, decimal, picture_name, rounded, say_left_out, values_of

# Characters outside of XML 1.0; a carriage return would be read as a line feed.
_FORBIDDEN = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VOC_OFFSET = np.array(VOC_OFFSET)
_CVAT_SIDES = ("xtl", "ytl", "xbr", "ybr")


def xml_text(text: str) -> str:
    """Return text with the characters that XML cannot hold as backslash escapes."""
    return _FORBIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def voc_document(found: Any, file_name: str | None) -> str:
    """Return `Detections` as a Pascal VOC document; see `Detections.to_voc`."""
    say_left_out(found, "Pascal VOC", "masks", "track_ids", "spans")
    root = Element("annotation")
    _text(root, "folder", "")
    _text(root, "filename", picture_name(found, file_name))
    size = SubElement(root, "size")
    for name, value in zip(("width", "height", "depth"), (*found.size, 3), strict=True):
        _text(size, name, str(value))
    _text(root, "segmented", "0")
    sides = rounded(decimal(found.boxes) + _VOC_OFFSET, lambda values: values - _VOC_OFFSET, found.boxes)
    for label, score, box in zip(found.text_labels, decimal(found.scores).tolist(), sides.tolist(), strict=True):
        item = SubElement(root, "object")
        _text(item, "name", label)
        for name, value in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0"), ("score", str(score))):
            _text(item, name, value)
        bounds = SubElement(item, "bndbox")
        for name, side in zip(SIDES, box, strict=True):
            _text(bounds, name, _number(side))
    return _written(root)


def read_voc(document: str, names: Sequence[str] | None, source: str | None) -> dict[str, Any]:
    """Return the arguments of `Detections` for a Pascal VOC document.

    Raises:
        ValueError: It is not one.
    """
    root = parse_xml(document, "annotation")
    boxes, texts, scores = [], [], []
    for item in voc_objects(root):
        boxes.append(item.sides())
        texts.append(item.name)
        scores.append(None if item.flag("score") is None else xml_number(item.element, "score"))
    size = (int(xml_number(root, "size/width")), int(xml_number(root, "size/height")))
    given = source if source is not None else root.findtext("filename")
    table = box_table(boxes) - _VOC_OFFSET
    return values_of(table, _restored(texts, names), size, names, scores, source=given)


def cvat_meta(names: Sequence[str]) -> Element:
    """Return the <meta> of a CVAT document, with a text attribute "score" for each label."""
    meta = Element("meta")
    labels = SubElement(SubElement(meta, "task"), "labels")
    for name in names:
        label = SubElement(labels, "label")
        _text(label, "name", name)
        attribute = SubElement(SubElement(label, "attributes"), "attribute")
        for key, value in (("name", "score"), ("mutable", "False"), ("input_type", "text"), ("default_value", "")):
            _text(attribute, key, value)
        SubElement(attribute, "values")
    return meta


def cvat_image(found: Any, image_id: int, file_name: str | None) -> Element:
    """Return the <image> of a picture in a CVAT document."""
    say_left_out(found, "CVAT for images", "masks", "track_ids", "spans")
    width, height = found.size
    name = xml_text(picture_name(found, file_name))
    image = Element("image", {"id": str(image_id), "name": name, "width": str(width), "height": str(height)})
    rows = zip(found.text_labels, decimal(found.scores).tolist(), decimal(found.boxes).tolist(), strict=True)
    for label, score, box in rows:
        sides = {side: _number(value) for side, value in zip(_CVAT_SIDES, box, strict=True)}
        values = {"label": xml_text(label), "source": "auto", "occluded": "0", **sides, "z_order": "0"}
        _text(SubElement(image, "box", values), "attribute", str(score)).set("name", "score")
    return image


def cvat_document(found: Any, file_name: str | None) -> str:
    """Return `Detections` as a CVAT document of one picture; see `Detections.to_cvat`."""
    root = Element("annotations")
    _text(root, "version", "1.1")
    root.extend([cvat_meta(found.names), cvat_image(found, 0, file_name)])
    return _written(root)


def read_cvat(document: str, image: str | None, names: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments of `Detections` for one picture of a CVAT document.

    Raises:
        ValueError: It is not one, or the picture is not in it, or there are several and none was chosen.
    """
    root = parse_xml(document, "annotations")
    pictures = root.findall("image")
    chosen = [row for row in pictures if image is None or row.get("name") == xml_text(image)]
    if len(chosen) != 1:
        raise ValueError(f"{len(chosen)} of the {len(pictures)} pictures fit image={image!r}; give the name of one.")
    row = chosen[0]
    if names is None:
        names = [label.findtext("name") or "" for label in root.iterfind("meta/*/labels/label")] or None
    boxes, texts, scores = [], [], []
    for box in row.findall("box"):
        boxes.append([as_number(box.get(side), side) for side in _CVAT_SIDES])
        texts.append(box.get("label") or "")
        score = box.find("attribute[@name='score']")
        scores.append(None if score is None or not score.text else as_number(score.text, "score"))
    size = (int(as_number(row.get("width"), "width")), int(as_number(row.get("height"), "height")))
    return values_of(box_table(boxes), _restored(texts, names), size, names, scores, source=image or row.get("name"))


def _restored(texts: list[str], names: Sequence[str] | None) -> list[str]:
    """Return labels as they were before characters that XML cannot hold were escaped."""
    original = {xml_text(name): name for name in names or ()}
    return [original.get(text, text) for text in texts]


def _text(parent: Element, name: str, text: str) -> Element:
    child = SubElement(parent, name)
    child.text = xml_text(text)
    return child


def _number(value: float) -> str:
    """Format a side; a whole number as an integer, which older readers need."""
    return (
        str(int(value)) if value == int(value) else f"{value:.15f}".rstrip("0") if "e" in repr(value) else repr(value)
    )


def _written(root: Element) -> str:
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
