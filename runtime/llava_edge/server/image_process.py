"""The process that decodes pictures: files come in on stdin, pixels go out on stdout.

Decoders are where hostile files strike. This process has a bounded memory, writes no files, and is ended by the
server when a picture takes too long; it ends itself when the server is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
import sys
from typing import Any, BinaryIO

from llava_edge import images
from llava_edge.errors import ImageError
from llava_edge.types import ImageSpec

MEMORY_BYTES = 2 * 1024 * 1024 * 1024
LENGTH = struct.Struct(">I")


def main() -> None:
    """Answer requests until stdin ends. The first argument has the settings as JSON."""
    settings = json.loads(sys.argv[1])
    spec = settings["spec"] and ImageSpec(**{name: _tuple(value) for name, value in settings["spec"].items()})
    limit_resources()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (data := _read(source)) is not None:
        head, pixels = decode(data, spec, _tuple(settings["pad_color"]))
        for part in (json.dumps(head).encode(), pixels):
            sink.write(LENGTH.pack(len(part)))
            sink.write(part)
        sink.flush()


def decode(data: bytes, spec: ImageSpec | None, pad_color: Any) -> tuple[dict[str, Any], bytes]:
    """Size and pixels of a picture, or what is wrong with it."""
    try:
        image = images.read(data, spec, pad_color)
    except ImageError as error:
        return {"error": str(error), "hint": error.hint}, b""
    except MemoryError:
        return {"error": "the picture needs more memory than is allowed", "hint": None}, b""
    return {"size": image.size}, image.tobytes()


def limit_resources() -> None:
    """Bound memory and forbid writing files, where the system can."""
    for module in (*(module for _, module, _ in images.READERS), images.HEIF_MODULE):
        with contextlib.suppress(ImportError):  # HEIC is an extra
            importlib.import_module(module)  # a limited process may not be able to load it
    try:
        import resource
    except ImportError:
        return
    limits = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0))
    for kind, limit in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(kind, (limit, limit))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = source.read(length)
    return data if len(data) == length else None


if __name__ == "__main__":
    main()
