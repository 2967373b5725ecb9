"""Pictures given as text that is not a path: http and https addresses, data addresses and base64."""

import base64
import http.client
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from .picture_limits import MEGABYTE, PictureError, PictureLimits
from .printable import printable

SECONDS = 30.0
"""How long a server may take for each step of an answer, by default."""

_WEB = ("http://", "https://")
# Every picture needs more base64 characters than this; a shorter string is a path.
_SHORTEST_PICTURE = 64
_WEB_SIGNS = str.maketrans("-_", "+/")


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
        return fetched(image, SECONDS if timeout is None else timeout)
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
    # Web addresses have two other signs, and often no padding.
    plain = "".join(text.split()).translate(_WEB_SIGNS).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def fetched(address: str, timeout: float = SECONDS) -> bytes:
    """Download a picture.

    Args:
        address: An http(s) address.
        timeout: Seconds that a server may take for each step of its answer.

    Returns:
        The content.

    Raises:
        PictureError: A ValueError: the server cannot be reached or refuses the request, or the picture is larger than
            `PictureLimits` allow. The message names the host and the cause.
    """
    name, most = printable(address, limit=200), PictureLimits.current().bytes
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "gdino-hf"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            data: bytes = answer.read(most + 1)
    # http.client and the codecs of host names raise exceptions of several types.
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause, remedy = _cause(error, address, timeout)
        raise PictureError(name, f"cannot be read ({cause})", remedy, "address") from error
    if len(data) > most:
        raise PictureError(
            name,
            f"has more than {most / MEGABYTE:g} MB, the limit of a picture",
            "make it smaller, or raise the limit with GDINO_MAX_MEGABYTES",
            "bytes",
        )
    return data


def _cause(error: Exception, address: str, timeout: float) -> tuple[str, str]:
    """Say why an address cannot be read, and what to do about it."""
    try:
        host = printable(urllib.parse.urlsplit(address).hostname or "", limit=100)
    except ValueError:
        host = ""
    if not host:
        return "it names no host that can be asked", "give an address like https://example.org/cat.jpg"
    if isinstance(error, urllib.error.HTTPError):
        there = error.code in (404, 410)
        answer = f"HTTP Error {error.code} of {host}: {printable(error.reason or 'no reason given', limit=100)}"
        return answer, "check the address" if there else "try later, or download the picture and give the file"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, socket.gaierror):
        return f"the host {host} is not found: {printable(error.strerror)}", "check its name and the network"
    if isinstance(error, TimeoutError):
        return f"{host} does not answer within {timeout:g} seconds", "try later, or give a downloaded file"
    if isinstance(error, ssl.SSLError):
        why = printable(getattr(error, "verify_message", "") or error.reason or error, limit=100)
        return f"no secure connection to {host} can be made: {why}", "download the picture and give the file"
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return f"{host} cannot be asked: {printable(why, limit=200)}", "check the address and the network"
