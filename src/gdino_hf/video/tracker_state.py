"""The state of a tracker as JSON: objects of the library `trackers`, its arrays and numbers, without loss.

Reading such a file runs no code of it: only objects of classes of that library are made, and only their attributes set.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..error_text import reason
from ..whole_files import write_whole_text

Made = TypeVar("Made")

# The key that tells what a dict stands for.
_KIND = "!"
_PLAIN = (str, bool, int, float, type(None))
_SEQUENCES = {"tuple": tuple, "set": set, "deque": deque}
_LIBRARY = "trackers"


def encode(value: Any) -> Any:
    """Return a value as what JSON can hold.

    Args:
        value: Numbers, texts, arrays, collections of them, and objects and classes of the library `trackers`.

    Raises:
        TypeError: There is something else in it.
    """
    if isinstance(value, np.generic):
        return encode(np.asarray(value)) | {_KIND: "number"}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_KIND: "array", "type": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, list):
        return [encode(item) for item in value]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            length = {"most": value.maxlen} if isinstance(value, deque) else {}
            return {_KIND: name, "items": [encode(item) for item in value], **length}
    if isinstance(value, dict):
        return {_KIND: "dict", "items": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, type) and _is_known(value):
        return {_KIND: "class", "name": f"{value.__module__}:{value.__qualname__}"}
    if _is_known(type(value)) and hasattr(value, "__dict__"):
        return {_KIND: "object", "class": encode(type(value)), "values": encode(vars(value))}
    raise TypeError(f"The state of a tracker holds a {type(value).__name__}, which cannot be saved.")


def decode(value: Any) -> Any:
    """Return what `encode` was given.

    Raises:
        ValueError: It is not what `encode` returns.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    try:
        if kind in ("array", "number"):
            data = np.frombuffer(base64.b64decode(value["data"]), dtype=_number_type(value["type"]))
            array = data.reshape(value["shape"]).copy()
            return array if kind == "array" else array[()]
        if kind == "dict":
            return {decode(key): decode(item) for key, item in value["items"]}
        if kind == "deque":
            return deque((decode(item) for item in value["items"]), maxlen=value["most"])
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](decode(item) for item in value["items"])
        if kind == "class":
            return _class(value["name"])
        if kind == "object":
            found = object.__new__(decode(value["class"]))
            # Some classes are frozen, and none needs its __init__: all attributes are set.
            vars(found).update(decode(value["values"]))
            return found
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is no state of a tracker: {error}") from error
    raise ValueError(f"it is no state of a tracker: there is no kind {kind!r}")


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write the state of a tracker into a JSON file.

    Raises:
        OSError: The file cannot be written.
    """
    write_whole_text(Path(path), json.dumps(state))


def read_state(path: str | os.PathLike[str], make: Callable[[Mapping[str, Any]], Made]) -> Made:
    """Make a tracker of the state in a JSON file.

    Args:
        path: The file.
        make: Returns the tracker of a state, or raises a ValueError.

    Raises:
        ValueError: The file cannot be read, or holds no state that `make` takes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no state of a tracker")
        return make(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read ({reason(error)}); give a file that Tracker.save or --state wrote."
        ) from error


def _number_type(text: Any) -> np.dtype:
    found = np.dtype(text)
    if found.kind not in "biuf":
        raise ValueError(f"{text!r} is no type of numbers")
    return found


def _is_known(kind: type) -> bool:
    return kind.__module__.split(".")[0] == _LIBRARY


def _class(name: str) -> type:
    module, _, path = name.partition(":")
    if module.split(".")[0] != _LIBRARY:
        raise ValueError(f"{name} is not of the library {_LIBRARY}")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not _is_known(found):
        raise ValueError(f"{name} is no class of the library {_LIBRARY}")
    return found
