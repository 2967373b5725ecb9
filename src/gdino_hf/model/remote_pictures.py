"""Pictures given as text that is not a path: http and https addresses, data addresses and base64."""

import base64
import http.client
import os
import urllib.request
from typing import Any

from .picture_files import MEGABYTE, PictureLimits
from .printable import printable

SECONDS = 30.0
"""How long a server may take for each step of an answer, by default."""

_WEB = ("http://", "https://")
# Every picture needs more base64 characters than this; a shorter string is a path.
_SHORTEST_PICTURE = 64


def downloaded(image: Any, timeout: float | None = None) -> Any:
    """Return the content of a picture at an address; return any other picture as it is.

    Args:
        image: An http(s) or data address, a picture in base64, or a picture of any other type, paths included.
        timeout: Seconds that a server may take for each step of its answer; None for `SECONDS`.

    Returns:
        The content as bytes, or the picture unchanged.

    Raises:
        ValueError: The address cannot be read, or its content is larger than `PictureLimits` allow.
    """
    if not isinstance(image, str):
        return image
    if image.lower().startswith(_WEB):
        return _fetched(image, SECONDS if timeout is None else timeout)
    if image.lower().startswith("data:image/"):
        head, _, text = image.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError(
                f"The address {printable(image, limit=40)} is not in base64; give data:image/png;base64,..."
            )
        try:
            return _from_base64(text)
        except ValueError as error:
            raise ValueError(f"The address {printable(head)},... holds no base64 ({error}).") from error
    if len(image) < _SHORTEST_PICTURE or os.path.isfile(image):
        return image
    try:
        return _from_base64(image)
    except ValueError:
        return image


def _from_base64(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


def _fetched(address: str, timeout: float) -> bytes:
    """Download a picture."""
    name, most = printable(address, limit=200), PictureLimits.current().bytes
    request = urllib.request.Request(address, headers={"User-Agent": "gdino-hf"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            data: bytes = answer.read(most + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name} cannot be read ({printable(error, limit=200)}); check the address.") from error
    if len(data) > most:
        raise ValueError(
            f"{name} has more than {most / MEGABYTE:g} MB, the limit of a picture; make it smaller, or raise the limit "
            "with GDINO_MAX_MEGABYTES."
        )
    return data
