"""Reading benchmarks as they are published. What is malformed is named by file and line, and skipped only if asked."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_edge.errors import InputError
from llava_edge.strict_json import Fields, parse_object

T = TypeVar("T")
_SKIP_HINT = "Mend it, or leave such entries out with --skip-bad, which counts them."


class Data:
    """A folder with a benchmark. ``skipped`` holds what was wrong with the entries that were left out."""

    def __init__(self, root: Path, *, images: Sequence[Path] = (), skip_bad: bool = False) -> None:
        if not root.is_dir():
            raise InputError(f"no such folder: {root}", hint="--data is the folder with the benchmark's files.")
        for folder in images:
            if not folder.is_dir():
                raise InputError(f"no such folder of pictures: {folder}")
        self.root = root
        self.skipped: list[str] = []
        self._images = tuple(images)
        self._skip_bad = skip_bad

    def find(self, *patterns: str, optional: bool = False) -> Path | None:
        """The first file that matches one of the patterns, the earlier pattern first; InputError names them all."""
        for pattern in patterns:
            found = sorted(path for path in self.root.glob(pattern) if path.is_file())
            if found:
                return found[0]
        if optional:
            return None
        raise InputError(f"{self.root} has no {' or '.join(patterns)}", hint="docs/evaluation.md shows the layout.")

    def require(self, *patterns: str) -> Path:
        """As :meth:`find`, for a file that has to be there."""
        path = self.find(*patterns)
        assert path is not None
        return path

    def picture(self, name: str, *folders: str) -> Path:
        """The path of a picture, looked for in ``--images`` or in these folders of the data."""
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"the picture's name is {name!r}; expected a path inside the folder of pictures")
        places = self._images or tuple(self.root / folder for folder in (*folders, "images", "."))
        for place in places:
            if (place / name).is_file():
                return place / name
        looked = ", ".join(str(place) for place in places)
        raise InputError(f"no picture {name} in {looked}")

    def rows(self, path: Path, parse: Callable[[Fields], T]) -> list[T]:
        """Parse the objects of a JSON list or of a file of lines; the first character tells which it is."""
        if self._bytes(path).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return self.entries(path, listed(self.json(path)), parse)
        return self.jsonl(path, parse)

    def jsonl(self, path: Path, parse: Callable[[Fields], T]) -> list[T]:
        """Parse every line of a file of JSON objects; blank lines are nothing."""
        lines = self._bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
        return self.each(path, [(n, line) for n, line in enumerate(lines, 1) if line.strip()], _line(parse))

    def entries(self, path: Path, values: Iterable[tuple[Any, Any]], parse: Callable[[Fields], T]) -> list[T]:
        """Parse (name, value) pairs out of one JSON file, each value an object."""
        return self.each(path, values, lambda value: parse(as_fields(value)))

    def each(self, path: Path, values: Iterable[tuple[Any, Any]], parse: Callable[[Any], T]) -> list[T]:
        """Parse (where, value) pairs; an InputError gets the file and the place in front, or is skipped."""
        return list(self._each(path, values, parse))

    def _each(self, path: Path, values: Iterable[tuple[Any, Any]], parse: Callable[[Any], T]) -> Iterator[T]:
        for where, value in values:
            try:
                parsed = parse(value)
            except InputError as error:
                message = f"{path}:{where}: {error}"
                if not self._skip_bad:
                    raise InputError(message, hint=_SKIP_HINT) from None
                self.skipped.append(message)
                continue
            yield parsed

    def text(self, path: Path) -> str:
        """A file's text."""
        try:
            return self._bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"can't read {path}: {error}") from None

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"no such file: {path}") from None
        except OSError as error:
            raise InputError(f"can't read {path}: {error}") from None

    def json(self, path: Path) -> Any:
        """A whole file of JSON."""
        try:
            return json.loads(self.text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from None

    def list_of(self, path: Path, key: str) -> list[tuple[str, Any]]:
        """The entries of a list in a file that is a JSON object, with the names that messages give them."""
        values = self.object(path).raw().get(key)
        if not isinstance(values, list):
            raise InputError(f"{path} has no list named {key}")
        return listed(values)

    def object(self, path: Path) -> Fields:
        """A whole file that is a JSON object."""
        value = self.json(path)
        if not isinstance(value, dict):
            raise InputError(f"{path} is a JSON {type(value).__name__}; expected an object")
        return Fields(value, str(path))


def listed(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """The entries of a JSON list with the names that messages give them."""
    return [(f"entry {number}", value) for number, value in enumerate(values, 1)]


def identifier(fields: Fields, key: str) -> str:
    """An id, which benchmarks write as a number or as a text."""
    value = fields.raw().get(key)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{key} is {value!r}; expected a number or a text")
    return str(value)


def _line(parse: Callable[[Fields], T]) -> Callable[[bytes], T]:
    def parsed(line: bytes) -> T:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8: {error}") from None
        fields = parse_object(text)
        _check_text(fields.raw())
        return parse(fields)

    return parsed


def as_fields(value: Any) -> Fields:
    """A JSON object to read; InputError for anything else."""
    if not isinstance(value, dict):
        raise InputError(f"is {json.dumps(value)[:60]}; expected an object")
    _check_text(value)
    return Fields(value)


def _check_text(value: Any) -> None:
    """JSON can write half of a pair of UTF-16, which is no character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("holds half a character (a lone surrogate)") from None
