"""Pascal VOC documents: a picture's name and size, and its objects, as they lie in the XML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from ..model.text_prompt import shorten

SIDES = ("xmin", "ymin", "xmax", "ymax")

VOC_OFFSET = (1.0, 1.0, 0.0, 0.0)
"""What VOC adds to x1, y1, x2, y2: it counts pixels from 1, and its last pixel belongs to the box."""


@dataclass(frozen=True)
class VocObject:
    """An object of a document.

    Attributes:
        name: Its name; "" if it has none.
        element: Its element, which `sides` and `xml_number` read.
    """

    name: str
    element: Element

    def sides(self) -> list[float]:
        """Return xmin, ymin, xmax and ymax as they are written.

        Raises:
            ValueError: One is missing, or no number.
        """
        return [xml_number(self.element, f"bndbox/{side}") for side in SIDES]

    def flag(self, name: str) -> str | None:
        """Return the text of a flag such as "difficult"; None without it."""
        return self.element.findtext(name)


def voc_objects(root: Element) -> Iterator[VocObject]:
    """Yield the objects of a document."""
    for element in root.findall("object"):
        yield VocObject(element.findtext("name") or "", element)


def parse_xml(document: str | bytes, name: str) -> Element:
    """Parse an XML document without entities.

    Args:
        document: The document.
        name: Name of its root.

    Raises:
        ValueError: It cannot be parsed, has a DOCTYPE, or another root.
    """
    data = document.encode("utf-8") if isinstance(document, str) else document
    # Entities, which only a DOCTYPE defines, can make a small document fill the memory.
    if b"<!DOCTYPE" in data.replace(b"\0", b""):
        raise ValueError("The XML has a DOCTYPE, which is not read because it may define entities; remove it.")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"The XML cannot be read ({error}).") from None
    if root.tag != name:
        raise ValueError(f"The XML is a <{root.tag}>, not an <{name}>.")
    return root


def xml_number(parent: Element, path: str) -> float:
    """Return the number of an element.

    Raises:
        ValueError: It is missing, or no number.
    """
    return as_number(parent.findtext(path), path)


def as_number(text: str | None, what: str) -> float:
    """Return a text as a number.

    Raises:
        ValueError: It is none.
    """
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"The XML has {shorten(text)} for {what}; it must be a number.") from None
