"""Who may ask: checks of every request before anything is read from it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_edge.errors import InputError
from llava_edge.server.errors import ApiError

# What a browser may see without a key: that the server is there, and the page that asks for the key.
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class Access:
    """Who may ask. ``keys`` empty is everybody; ``loopback`` expects the names of this machine only."""

    keys: tuple[str, ...] = ()
    loopback: bool = True
    origins: tuple[str, ...] = ()

    def allows_key(self, given: str) -> bool:
        """Compare in constant time: neither length nor content of the keys shows in how long it takes."""
        digest = hashlib.sha256(given.encode()).digest()
        found = False
        for key in self.keys:
            found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
        return found

    def allows_host(self, host: str) -> bool:
        """A page elsewhere can point a name of its own at this machine; browsers then send that name."""
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return not self.loopback or is_loopback(name.lower())

    def allows_origin(self, origin: str, host: str) -> bool:
        """Pages of this server, and those that were asked for."""
        return origin.partition("://")[2] == host or origin in self.origins or "*" in self.origins


class Guard:
    """ASGI middleware that refuses who may not ask, and adds headers that every answer has."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        error = self._refusal(Headers(scope=scope), scope["path"])
        if error is None:
            await self._app(scope, receive, guarded)
        else:
            response = JSONResponse(error.body(), error.status, headers=error.headers())
            await response(scope, receive, guarded)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        access, host = self._access, headers.get("host", "")
        if not access.allows_host(host):
            return ApiError(403, "This server answers to localhost only.", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not access.allows_origin(origin, host):
            return ApiError(
                403, "Pages of other sites may not use this server.", code="wrong_origin", hint="See --cors-origin."
            )
        if not access.keys or path in _OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return ApiError(401, "This server wants an API key: Authorization: Bearer KEY.", code="missing_api_key")
        if not access.allows_key(key.strip()):
            return ApiError(401, "The API key is wrong.", code="invalid_api_key")
        return None


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # don't count."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"can't read the API keys in {path}: {reason}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    short = sum(len(key) < _MIN_KEY_LENGTH for key in keys)
    if short or not keys:
        problem = f"{short} of its keys are shorter" if keys else "it holds no API key"
        raise InputError(
            f"{path} has to hold keys of at least {_MIN_KEY_LENGTH} characters, one a line; {problem}",
            hint=f"For example: {new_key()}",
        )
    return keys


def new_key() -> str:
    """A key that nobody can guess."""
    return f"le-{secrets.token_urlsafe(24)}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to this name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def origins(values: Sequence[str]) -> tuple[str, ...]:
    """Origins for CORS, as browsers send them; InputError for one that is none."""
    for value in values:
        scheme, _, rest = value.partition("://")
        if value != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
            raise InputError(f"{value!r} is not an origin", hint="Expected https://example.org, without a path, or *.")
    return tuple(values)
