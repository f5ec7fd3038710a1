"""Paths as terminals write them when a file is dropped on the window: quoted, with ``\\ ``, or as a file:// URL."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llava_edge.paths import is_file

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_PATH_STARTS = ("/", "~/", "./", "../", "file://", "'/", '"/', "'~/", '"~/', "'file://", '"file://')


def picture_path(word: str) -> Path:
    """A word without its shell quoting as a path; ``~`` and file:// URLs are understood.

    What only begins like one of these, such as the home of nobody, is taken literally.
    """
    try:
        return Path(unquote(urlsplit(word).path)) if word.startswith("file://") else Path(word).expanduser()
    except (ValueError, RuntimeError):
        return Path(word)


def unquoted(text: str) -> str:
    """A file's name as a shell would read it, if that makes it one word; otherwise the text as it is."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text


def split_pictures(line: str) -> tuple[list[Path], str]:
    """Take the pictures from the start of a line and return them and the rest, the question.

    A word counts as a picture if it looks like a path and is an existing file, or has a picture's suffix and is the
    whole line. ``/image`` is no path, ``/tmp/cat.jpg`` is one even if no such file exists.
    """
    if line and _is_picture(picture_path(line), line):
        return [picture_path(line)], ""
    pictures: list[Path] = []
    rest = line
    while rest.startswith(_PATH_STARTS):
        word, after = _first_word(rest)
        if word is None or not _is_picture(picture_path(word), word):
            break
        pictures.append(picture_path(word))
        rest = after.lstrip()
    return pictures, rest


def _first_word(line: str) -> tuple[str | None, str]:
    """The first word as a shell would read it, and what follows; None if a quote is open."""
    stream = io.StringIO(line)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return lexer.get_token(), line[stream.tell() :]
    except ValueError:
        return None, line


def _is_picture(path: Path, word: str) -> bool:
    has_suffix = path.suffix.lower() in SUFFIXES
    absolute = word.startswith(("/", "~/", "file://")) and " " not in word
    return (is_file(path) and (has_suffix or absolute)) or (has_suffix and absolute and len(path.parts) > 1)
