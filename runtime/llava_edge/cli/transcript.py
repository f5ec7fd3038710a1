"""A conversation as a file: Markdown or JSON, by the name's suffix."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_edge.errors import InputError

Turn = tuple[str, str, Sequence[str]]
_WHO = {"user": "You", "assistant": "Answer"}


def save(path: Path, record: dict[str, Any], turns: Iterable[Turn]) -> None:
    """Write turns of (role, text, names of pictures) and what they were made with; whole or not at all.

    A picture's name that is no text has its odd bytes as ``\\udcff``.

    Raises
    ------
    InputError
        The suffix is neither .md, .markdown nor .json, or the file can't be written.
    """
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown"):
        text = as_markdown(record, turns)
    elif suffix == ".json":
        text = as_json(record, turns)
    else:
        raise InputError(f"can't save as {path.name}: the format is not known", hint="Use a name with .md or .json.")
    try:
        _write(path, text)
    except (OSError, ValueError) as error:
        raise InputError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from None


def as_json(record: dict[str, Any], turns: Iterable[Turn]) -> str:
    """One object: the record and ``turns`` of ``role``, ``text`` and ``images``."""
    listed = [{"role": role, "text": text, "images": list(images)} for role, text, images in turns]
    return json.dumps({**record, "turns": listed}, ensure_ascii=False, indent=2) + "\n"


def as_markdown(record: dict[str, Any], turns: Iterable[Turn]) -> str:
    """A heading and a paragraph a turn."""
    parts = [f"# Conversation with {record['model']}"]
    if record.get("system"):
        parts.append(f"System: {record['system']}")
    for role, text, images in turns:
        parts.append(f"## {_WHO.get(role, role)}")
        if images:
            parts.append("\n".join(f"- picture: {name}" for name in images))
        parts.append(text)
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
