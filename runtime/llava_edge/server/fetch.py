"""Pictures by http(s), for servers that allow it: from public addresses only.

A name is resolved once, every address it has must be public, and the connection goes to the address that was checked,
so that a name can't mean another machine the next moment. Each redirect is checked in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, urljoin, urlsplit

from llava_edge.errors import ImageError

MAX_BYTES = 32 * 1024 * 1024
MAX_SECONDS = 20.0
MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_FETCHERS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="fetch")


async def fetch(url: str) -> bytes:
    """The bytes behind an address; ImageError says why there are none."""
    # Threads of their own: a slow server must not keep those busy that everything else needs.
    return await asyncio.get_running_loop().run_in_executor(_FETCHERS, fetch_now, url, is_public)


def fetch_now(url: str, allowed: Callable[[str], bool]) -> bytes:
    """The same, here and now; ``allowed`` tells which numeric addresses may be asked."""
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts = _checked(url)
        connection = _connect(parts, allowed, deadline)
        # Reading has a time limit for every piece only; a server that sends a byte now and then is left at the end.
        hang_up = threading.Timer(_left(deadline), _shut, [connection.sock])
        hang_up.start()
        try:
            connection.request("GET", _target(parts), headers={"Accept": "image/*", "User-Agent": "llava-edge"})
            with connection.getresponse() as response:
                if response.status in _REDIRECTS:
                    url = _next(url, response.getheader("Location") or "")
                    continue
                if response.status != 200:
                    raise ImageError(f"the picture's server answers with status {response.status}")
                return _read(connection, response, deadline)
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError(f"the picture's server can't be read: {type(error).__name__}") from None
        finally:
            hang_up.cancel()
            connection.close()
    raise ImageError(f"the picture's address redirects more than {MAX_REDIRECTS} times")


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the open net: not this machine's, a private network's or any special one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip in _NAT64):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6 and ip not in _UNICAST:
        return False
    special = any(ip in network for network in _SPECIAL)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not special


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is given out; Python calls the old site-local ones global
# Protocols (Teredo is one), 6to4 and its relays, and documentation: nobody's server is there.
_SPECIAL = tuple(
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
)


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ImageError("the picture's address is not valid") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ImageError("the picture's address has to begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ImageError("the picture's address may not hold a name or password")
    if not url.isascii() or any(character <= " " or character == "\x7f" for character in url):
        raise ImageError("the picture's address has characters that have to be written with %")
    if port == 0:
        raise ImageError("the picture's address has port 0")
    return parts


def _next(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise ImageError("the picture's address redirects to one that is not valid") from None


def _connect(parts: SplitResult, allowed: Callable[[str], bool], deadline: float) -> http.client.HTTPConnection:
    """A connection to one of the addresses that were checked."""
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ImageError("the picture's server is not known") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(allowed(address.partition("%")[0]) for address in addresses):
        raise ImageError("the picture's address leads into a private network, which is not allowed")
    plain = _reach(list(dict.fromkeys(addresses)), port, deadline)
    connection = http.client.HTTPConnection(host, port, timeout=_left(deadline))
    connection.default_port = _PORTS[parts.scheme]  # it is left out of the Host that is asked for
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
    except OSError as error:
        plain.close()
        raise ImageError(f"the picture's server can't be trusted: {type(error).__name__}") from None
    return connection


def _reach(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first address that answers: a machine may have no way to those of IPv6, or to some."""
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        try:
            return socket.create_connection((address, port), timeout=_left(deadline) / left)
        except OSError as error:
            failed = error
    raise ImageError(f"the picture's server can't be reached: {type(failed).__name__}") from None


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    data = bytearray()
    while True:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline))
        part = response.read1(_CHUNK)
        if not part:
            return bytes(data)
        data += part
        if len(data) > MAX_BYTES:
            raise ImageError(f"the picture has more than {MAX_BYTES:,} bytes")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ImageError(f"the picture took more than {MAX_SECONDS:.0f} s to fetch")
    return left


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
