"""Reading JSON objects strictly: every key is asked for by name and type, and a key nobody asked for is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from llava_edge.errors import InputError

T = TypeVar("T")


class Fields:
    """A JSON object being read. ``where`` is the path to it in messages, empty at the root."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where
        self._asked: set[str] = set()

    def build(self, read: Callable[[Fields], T]) -> T:
        """Let ``read`` take what it needs, then refuse keys that are left over. Its errors get the path in front."""
        try:
            result = read(self)
        except InputError as error:
            message = str(error)
            known = not self._where or message.startswith(self._where)
            raise InputError(message if known else f"{self._where}.{message}") from None
        left = sorted(set(self._values) - self._asked)
        if left:
            raise InputError(f"unknown key {self._path(left[0])}")
        return result

    def raw(self) -> dict[str, Any]:
        """The object as it is."""
        return self._values

    def has(self, key: str) -> bool:
        """Whether the key is there; asking makes it known."""
        self._asked.add(key)
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key, which has to be there, is null."""
        return self._get(key) is None

    def text(self, key: str) -> str:
        """A string."""
        return self._typed(key, str, "a text")

    def integer(self, key: str) -> int:
        """A whole number."""
        return self._typed(key, int, "a whole number")

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise InputError(f"{self._path(key)} is {_short(value)}; expected true or false")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{self._path(key)} is {_short(value)}; expected a number")
        return float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._items(key, (str,), "texts", None))

    def integers(self, key: str, length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers, of the given length if there is one."""
        return tuple(self._items(key, (int,), "whole numbers", length))

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers, of the given length if there is one."""
        values = tuple(float(value) for value in self._items(key, (int, float), "numbers", length))
        if not all(math.isfinite(value) for value in values):
            raise InputError(f"{self._path(key)} holds a number that is not finite")
        return values

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """A list of pairs of whole numbers."""
        values = self._items(key, (list,), "pairs of whole numbers", None)
        if not all(len(v) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in v) for v in values):
            raise InputError(f"{self._path(key)} is {_short(values)}; expected a list of pairs of whole numbers")
        return tuple((first, second) for first, second in values)

    def object(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._typed(key, dict, "an object"), self._path(key))

    def objects(self, key: str) -> list[Fields]:
        """A list of nested objects."""
        items = self._items(key, (dict,), "objects", None)
        return [Fields(item, f"{self._path(key)}[{i}]") for i, item in enumerate(items)]

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        if key not in self._values:
            raise InputError(f"missing key {self._path(key)}")
        return self._values[key]

    def _typed(self, key: str, kind: type[T], words: str) -> T:
        value = self._get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{self._path(key)} is {_short(value)}; expected {words}")
        return value

    def _items(self, key: str, kinds: tuple[type, ...], words: str, length: int | None) -> list[Any]:
        value = self._get(key)
        right = isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
        if not right or (length is not None and len(value) != length):
            count = "a list of" if length is None else f"{length}"
            raise InputError(f"{self._path(key)} is {_short(value)}; expected {count} {words}")
        return list(value)


def parse_object(text: str) -> Fields:
    """Parse a JSON object; InputError for anything else, for a key that stands twice and for NaN."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"is {_short(value)}; expected an object")
    return Fields(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
