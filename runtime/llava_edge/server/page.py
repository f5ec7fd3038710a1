"""The web page: its parts, put into one document that asks for nothing else, and the policy that holds it to that."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

from starlette.responses import Response

SCRIPTS = ("text.js", "store.js", "pictures.js", "api.js", "panel.js", "main.js")


@functools.cache
def page() -> tuple[str, str]:
    """The document and its content security policy."""
    parts = resources.files("llava_edge.server").joinpath("page")
    style = parts.joinpath("style.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join(parts.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    document = parts.joinpath("index.html").read_text(encoding="utf-8")
    document = document.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return document, "; ".join(f"{name} {value}" for name, value in policy.items())


def response() -> Response:
    """The page as an answer."""
    document, policy = page()
    return Response(document, media_type="text/html", headers={"Content-Security-Policy": policy})


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
