"""LLaVA from training to a laptop.

    import llava_edge
    model = llava_edge.load("nano")
    chat = model.chat()
    reply = chat.ask("What is in this picture?", images=["cat.jpg"])

The names below are loaded when they are first used, so that ``import llava_edge`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_edge.errors import (
    ContextFullError,
    ImageError,
    InputError,
    LlavaEdgeError,
    MissingExtraError,
    ModelError,
    ParityError,
)

if TYPE_CHECKING:
    from llava_edge.images import open_image
    from llava_edge.model import Model, load
    from llava_edge.session import ChatSession
    from llava_edge.types import Chunk, Reply, SamplingParams, Timings, Usage

__all__ = [
    "ChatSession",
    "Chunk",
    "ContextFullError",
    "ImageError",
    "InputError",
    "LlavaEdgeError",
    "MissingExtraError",
    "Model",
    "ModelError",
    "ParityError",
    "Reply",
    "SamplingParams",
    "Timings",
    "Usage",
    "load",
    "open_image",
]

_LAZY = {
    "ChatSession": "session",
    "Chunk": "types",
    "Model": "model",
    "Reply": "types",
    "SamplingParams": "types",
    "Timings": "types",
    "Usage": "types",
    "load": "model",
    "open_image": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
