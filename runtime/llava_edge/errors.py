"""Errors that a caller can meet. Each message says what failed, the value, what was expected and the next step."""

from __future__ import annotations

import importlib.util


class LlavaEdgeError(Exception):
    """Base of every error that llava-edge raises on purpose.

    ``hint`` is the next step for the person, in a sentence of its own; the command line prints it on a second line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(LlavaEdgeError):
    """An argument or a file's content is not what was expected."""


class ImageError(InputError):
    """A picture can't be read, or lies outside the limits."""


class ModelError(LlavaEdgeError):
    """A model can't be found, is damaged, or its parts don't belong together."""


class ParityError(ModelError):
    """A written file does not compute what it was made of; nothing but a report was kept."""


class ModelFileError(ModelError):
    """A model's file is malformed. ``field`` names what is wrong in it: a key, a tensor, a part of its header."""

    def __init__(self, path: object, field: str, problem: str) -> None:
        super().__init__(
            f"{path}: {field} {problem}",
            hint="The file is damaged, unfinished or not made for llama.cpp: get it again, from a source you trust.",
        )
        self.field = field


class ContextFullError(LlavaEdgeError):
    """The prompt and the answer don't fit the context; the message has both numbers."""


class MissingExtraError(LlavaEdgeError):
    """An optional part isn't installed; the hint has the command that installs it."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise :class:`MissingExtraError` unless every module can be found; nothing is imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, which the extra {extra!r} brings",
            hint=f"Run in a clone of the repository: pip install '.[{extra}]'",
        )
