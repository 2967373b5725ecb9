"""Download pictures from the web, from public addresses only, whatever a name, its DNS records or a redirect say."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.parse
from typing import Any

from .safety import LARGEST_PICTURE, MEGABYTE, Refused

SECONDS = 15.0
MOST_REDIRECTS = 5
PORTS = (80, 443)
"""Ports that are connected to; the environment variable GDINO_DEMO_PORTS adds others, such as "8080, 8443"."""
LONGEST_ADDRESS = 2_000

# A DNS lookup cannot be interrupted, but waiting for its thread can.
_LOOKUPS = concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix="lookup")
# Blocks that Python's ipaddress takes for global, though no web server of the public internet is there: relays of 6to4
# and AMT, AS112's name servers, ORCHID's identifiers, documentation, segment routing, local NAT64, and the host of a
# virtual machine in Azure.
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "168.63.129.16/32",
        "192.0.0.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.175.48.0/24",
        "64:ff9b:1::/48",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
        "5f00::/16",
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The part of an address that ISATAP puts before an IPv4 address.
_ISATAP = (0x00005EFE, 0x02005EFE)
_NOT_PUBLIC = (
    "This address leads to a machine that is not on the public internet; give an address that anyone can open."
)


def fetch(address: str) -> bytes:
    """Download one picture.

    The name is looked up once per redirect, and the connection goes to the IP address that was checked. So a name
    cannot resolve to a public address for the check and to a private one for the connection (DNS rebinding).

    Args:
        address: Web address that begins with http:// or https://.

    Returns:
        The bytes as sent, at most `LARGEST_PICTURE`.

    Raises:
        Refused: The address is malformed or not public, or gives no file within `SECONDS`.
    """
    deadline = time.monotonic() + SECONDS
    address = (address or "").strip()
    for _ in range(MOST_REDIRECTS + 1):
        parts = _split(address)
        response, data = _get(parts, deadline)
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            address = urllib.parse.urljoin(address, response.headers["Location"])
            continue
        if response.status != 200:
            raise Refused(f"The web server answers with status {response.status}; check the address.")
        return data
    raise Refused(f"The address was redirected more than {MOST_REDIRECTS} times; give the one it ends at.")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    Args:
        address: IPv4 or IPv6 address in its usual notation, with or without a zone.

    Returns:
        False for loopback, private, link-local, site-local, shared, reserved, multicast, documentation and unspecified
        addresses, for those of relays and tunnels (6to4, Teredo, AMT), and for IPv6 addresses that embed an IPv4
        address of these kinds.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped
        if ip in _NAT64 or (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None and not is_public(str(embedded)):
            return False
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return True
        if ip not in _GLOBAL_UNICAST:
            return False
    special = any(ip in block for block in _SPECIAL)
    return ip.is_global and not (special or ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def allowed_ports() -> set[int]:
    """Return the ports that may be connected to: `PORTS`, and those of the environment variable GDINO_DEMO_PORTS."""
    given = os.environ.get("GDINO_DEMO_PORTS", "").replace(",", " ").split()
    return {*PORTS, *(int(port) for port in given if port.isdigit())}


def _split(address: str) -> urllib.parse.SplitResult:
    """Split an address into its parts, or refuse it."""
    if len(address) > LONGEST_ADDRESS:
        raise Refused(f"The address has {len(address)} characters; it may have {LONGEST_ADDRESS}, shorten it.")
    try:
        parts = urllib.parse.urlsplit(address)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise Refused("This is not a web address; give one that begins with https://.") from None
    if parts.scheme not in ("http", "https"):
        raise Refused("Only addresses that begin with http:// or https:// are opened; upload the file instead.")
    if usable and parts.port is not None and parts.port not in allowed_ports():
        allowed = ", ".join(map(str, sorted(allowed_ports())))
        raise Refused(
            f"The address names the port {parts.port}; only {allowed} are connected to, upload the file instead."
        )
    if not usable or parts.username is not None or any(c.isspace() or ord(c) < 33 for c in address):
        raise Refused("This is not a web address; give one like https://example.org/cat.jpg.")
    return parts


def _get(parts: urllib.parse.SplitResult, deadline: float) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request to the checked address of a host and read the answer; bodies of redirects are not read."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = str(parts.hostname)
    connection = _Pinned(host, port, _look_up(host, port, deadline), parts.scheme == "https", deadline)
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    # The socket's time limit applies between bytes; the timer ends downloads that trickle in.
    watchdog = threading.Timer(max(deadline - time.monotonic(), 0.01), connection.abort)
    watchdog.daemon = True
    watchdog.start()
    try:
        # No compression in transit, because a small compressed body could unpack to a huge one.
        connection.request("GET", target, headers={"User-Agent": "gdino-hf demo", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        data = response.read(LARGEST_PICTURE + 1) if response.status == 200 else b""
        if len(data) > LARGEST_PICTURE:
            raise Refused(f"The file is larger than {LARGEST_PICTURE // MEGABYTE} MB; make the picture smaller.")
        if time.monotonic() > deadline:
            raise TimeoutError
        return response, data
    except Refused:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() > deadline or isinstance(error, TimeoutError):
            raise Refused(f"The web server took more than {SECONDS:.0f} seconds; upload the file instead.") from error
        why = getattr(error, "strerror", None) or "it ends the connection"
        raise Refused(f"The server {host} cannot be reached ({why}); check the address.") from error
    finally:
        watchdog.cancel()
        connection.close()


def _look_up(host: str, port: int, deadline: float) -> str:
    """Look up a host name and return one of its addresses, all of which must be public."""
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
        future = _LOOKUPS.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = future.result(timeout=max(deadline - time.monotonic(), 0.01))
    except (OSError, UnicodeError, concurrent.futures.TimeoutError) as error:
        raise Refused(f"The host {host} is not found; check the address.") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise Refused(_NOT_PUBLIC)
    return addresses[0]


class _Pinned(http.client.HTTPConnection):
    """An HTTP connection to an IP address that was checked before; host header and TLS use the host name."""

    def __init__(self, host: str, port: int, address: str, encrypted: bool, deadline: float) -> None:
        super().__init__(host, port)
        self.address, self.encrypted, self.deadline = address, encrypted, deadline
        self.default_port = 443 if encrypted else 80
        self.opened: socket.socket | None = None

    def connect(self) -> None:
        remaining = max(self.deadline - time.monotonic(), 0.01)
        self.sock: Any = socket.create_connection((self.address, self.port), timeout=remaining)
        if self.encrypted:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        # Keep a second reference: the connection drops its own when the response begins.
        self.opened = self.sock

    def abort(self) -> None:
        """Close the socket from another thread, which ends any read on it."""
        if self.opened is not None:
            with contextlib.suppress(OSError):
                self.opened.shutdown(socket.SHUT_RDWR)
