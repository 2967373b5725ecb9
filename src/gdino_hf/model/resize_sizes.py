"""Sizes of pictures: what the option `size` may be, and the size of each picture after resizing."""

import sys
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from .picture_limits import MEGAPIXEL, PictureLimits

DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
_KEYS = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def checked_size(size: Any, max_size: int | None = None, *, square: bool = False) -> dict[str, int]:
    """Return the option `size` in its usual form.

    Args:
        size: A dict as for `GDinoImageProcessor`, transformers' SizeDict, or a whole number, the shortest edge.
        max_size: Longest edge in pixels, which belongs to a number or to a shortest edge; 1333 by default for a number.
        square: Whether a number is both height and width.

    Returns:
        One of {"shortest_edge", "longest_edge"}, {"shortest_edge"}, {"longest_edge"}, {"height", "width"} and
        {"max_height", "max_width"}, in pixels.

    Raises:
        TypeError: The size has another type.
        ValueError: The keys are others, a number is below 1, or max_size contradicts the size.
    """
    size = dict(size) if _is_size_dict(size) else size
    if isinstance(size, bool) or not isinstance(size, (Integral, Mapping)):
        raise TypeError(
            f"size must be a dict such as {{'shortest_edge': 800, 'longest_edge': 1333}}, got {size!r}; name the edges."
        )
    if isinstance(size, Integral):
        longest = DEFAULT_SIZE["longest_edge"] if max_size is None else max_size
        size = {"height": size, "width": size} if square else {"shortest_edge": size, "longest_edge": longest}
        max_size = None
    checked = {name: _whole(value) for name, value in size.items() if value is not None}
    if max_size is not None and checked.setdefault("longest_edge", int(max_size)) != max_size:
        raise ValueError(f"size {checked} and max_size {max_size} contradict each other; give one longest edge.")
    if set(checked) not in _KEYS or min(checked.values()) < 1:
        raise ValueError(
            f"size must be positive shortest_edge and longest_edge, or height and width, got {checked or 'nothing'}."
        )
    return checked


def checked_pad_size(size: Any) -> dict[str, int] | None:
    """Return the option `pad_size` in its usual form.

    Args:
        size: {"height", "width"} in pixels, transformers' SizeDict, or None.

    Returns:
        {"height", "width"}, or None.

    Raises:
        ValueError: It is something else, or beyond the limit of pixels.
    """
    if size is None:
        return None
    given = dict(size) if isinstance(size, Mapping) or _is_size_dict(size) else {}
    checked = {name: _whole(value) for name, value in given.items() if value is not None}
    if set(checked) != {"height", "width"} or min(checked.values()) < 1:
        raise ValueError(f"pad_size must be {{'height': ..., 'width': ...}} in pixels, got {size!r}.")
    _check_amount((checked["height"], checked["width"]), "pad_size", checked)
    return checked


def _is_size_dict(size: Any) -> bool:
    """Return whether an option is transformers' SizeDict, which is no Mapping; nobody has one without transformers."""
    module = sys.modules.get("transformers.image_utils")
    return module is not None and isinstance(size, module.SizeDict)


def _whole(value: Any) -> int:
    """Return a number of pixels; 0, which is refused afterwards, for what is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def _check_amount(target: tuple[int, int], name: str, size: Mapping[str, int]) -> None:
    """Refuse sizes that would fill the memory: what is resized or padded has the limit of a picture that is read."""
    height, width = target
    limit = PictureLimits.current().pixels
    if height * width > limit:
        raise ValueError(
            f"{name} {dict(size)} makes a picture of {width} x {height} pixels, and {limit / MEGAPIXEL:g} million are "
            "allowed; give smaller numbers, or set GDINO_MAX_MEGAPIXELS."
        )


def target_size(original: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """Return (height, width) after resizing, at least one pixel each even for a very long and thin picture.

    Args:
        original: (height, width) of the picture in pixels.
        size: Target size as in `GDinoImageProcessor`.

    Raises:
        ValueError: The result has more pixels than a picture may have, see `PictureLimits`.
    """
    target = _scaled(original, size)
    _check_amount(target, "size", size)
    return target


def _scaled(original: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / original[0], size["max_width"] / original[1])
        return max(1, int(original[0] * scale)), max(1, int(original[1] * scale))
    if "shortest_edge" not in size:
        scale = size["longest_edge"] / max(original)
        return max(1, round(original[0] * scale)), max(1, round(original[1] * scale))
    height, width = original
    longest = size.get("longest_edge")
    if longest is not None and longest * min(original) / max(original) < 0.5:
        return (longest, 1) if height > width else (1, longest)
    return _with_shortest_edge(height, width, size["shortest_edge"], longest)


def _with_shortest_edge(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """Return (height, width) with a shortest edge, or a smaller one with which the other is no longer than `longest`.

    The published checkpoints were trained on sizes rounded exactly so, and golden outputs depend on it: the shorter
    edge, if it must shrink, is rounded to the nearest number, and the longer edge is cut from its exact value.
    """
    small, large = min(height, width), max(height, width)
    exact: float = shortest
    if longest is not None and large / small * shortest > longest:
        exact = longest * small / large
        shortest = round(exact)
    if small == shortest:
        return height, width
    other = int(exact * large / small)
    return (max(1, other), max(1, shortest)) if width < height else (max(1, shortest), max(1, other))
