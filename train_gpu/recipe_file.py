"""Reading a recipe: TOML and the command line's changes into the dataclasses of :mod:`.config`, strictly."""

from __future__ import annotations

import dataclasses
import tomllib
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llava_edge.errors import InputError
from llava_edge.train_gpu.config import Recipe


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe; ``overrides`` are ``section.key=value`` with TOML values.

    A name without a file of that name is looked for among the recipes that come with llava-edge.
    """
    try:
        values = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not TOML: it is not UTF-8 text") from None
    for override in overrides:
        _override(values, override)
    recipe: Recipe = _build(Recipe, values, "")
    return recipe


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with llava-edge."""
    folder = resources.files("llava_edge.train_gpu").joinpath("recipes")
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def _text(path: Path) -> str:
    if path.is_dir() or not path.exists():  # a run's output may be named like its recipe
        name = str(path).removesuffix(".toml")
        if name not in builtin_recipes():
            raise InputError(f"no such recipe: {path}", hint=f"Name a file, or one of {', '.join(builtin_recipes())}.")
        return resources.files("llava_edge.train_gpu").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read the recipe {path}: {error.strerror}") from None


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('.') or 'the recipe'} is {values!r}; expected a table")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise InputError(f"unknown key {where}{key}", hint=f"Known keys: {', '.join(sorted(hints))}.")
    for field in dataclasses.fields(kind):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not optional:
            raise InputError(f"{where}{field.name} is missing from the recipe")
    return kind(**{key: _value(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` says, or an error that names the key."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}; expected {', '.join(arguments[:-1])} or {arguments[-1]}")
        return value
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if origin is not None or type(value) is not hint:
        wanted = {dict: "a table", tuple: "a list"}.get(origin or hint, getattr(hint, "__name__", str(hint)))
        raise InputError(f"{where} is {value!r}; expected {wanted}")
    return value


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise InputError(f"--set {override!r} has no '='; expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override!r}: {section} is not a section")
    values[last] = value
