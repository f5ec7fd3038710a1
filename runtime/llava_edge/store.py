"""Models that were pulled: one directory each under :func:`llava_edge.paths.models_dir`.

A directory holds a bundle (``llava-edge.json``) or a raw pair of GGUF files (``llava-edge-pair.json``). It appears
by a rename when everything in it is complete and checked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from llava_edge.bundle import MANIFEST_NAME, BundleFile, Role, open_bundle, sha256_file
from llava_edge.errors import InputError, ModelError
from llava_edge.paths import is_file, models_dir
from llava_edge.strict_json import Fields, parse_object

PAIR_NAME = "llava-edge-pair.json"
SCHEMA = 1
MAX_PAIR_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}\Z")


@dataclass(frozen=True)
class Pair:
    """What is known of a raw pair: where it came from, and the content of its files as it arrived."""

    name: str
    source: str
    revision: str
    license: str
    files: tuple[BundleFile, ...]
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if sorted(file.role for file in self.files) != ["llm", "mmproj"]:
            raise InputError("files has not exactly one entry of role llm and one of role mmproj")

    def file(self, role: Role) -> str:
        """The path of the file with this role, relative to the directory."""
        return next(file.path for file in self.files if file.role == role)

    def to_json(self) -> str:
        """The text of ``llava-edge-pair.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Pair:
        """Parse it; InputError names a wrong key."""
        return parse_object(text).build(_pair)


def _pair(f: Fields) -> Pair:
    schema = f.integer("schema")
    if schema != SCHEMA:
        raise InputError(f"schema is {schema}; this version of llava-edge reads {SCHEMA}")
    files = tuple(entry.build(_file) for entry in f.objects("files"))
    texts = {key: f.text(key) for key in ("name", "source", "revision", "license")}
    return Pair(files=files, warnings=f.texts("warnings"), schema=schema, **texts)


def _file(f: Fields) -> BundleFile:
    role = cast("Role", f.text("role"))
    return BundleFile(f.text("path"), role, f.text("sha256"), f.integer("bytes"), f.text("type"))


@dataclass(frozen=True)
class Pulled:
    """A pulled model. ``pair`` is None for a bundle."""

    name: str
    directory: Path
    source: str
    license: str
    files: tuple[BundleFile, ...]
    pair: Pair | None

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.files)


def check_name(name: str) -> str:
    """The name, if a directory may have it."""
    if not _NAME.match(name):
        raise InputError(f"{name!r} is no name for a model", hint="Use letters, digits, '.', '_', '+' and '-'.")
    return name


def open_pulled(directory: Path) -> Pulled:
    """Read a pulled model's manifest; ModelError says what is wrong with it."""
    name = directory.resolve().name  # "." has none
    if (directory / MANIFEST_NAME).is_file():
        manifest = open_bundle(directory).manifest
        return Pulled(name, directory, manifest.source, manifest.license, manifest.files, None)
    path = directory / PAIR_NAME
    try:
        if path.stat().st_size > MAX_PAIR_BYTES:
            raise InputError(f"has more than {MAX_PAIR_BYTES} bytes")
        pair = Pair.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise ModelError(f"{path}: {error}", hint=f"Remove it and pull it again: {name}") from None
    for file in pair.files:
        found = directory / file.path
        if not found.is_file() or found.stat().st_size != file.bytes:
            raise ModelError(f"{found} is missing or has not its {file.bytes} bytes", hint="Pull the model again.")
    return Pulled(name, directory, pair.source, pair.license, pair.files, pair)


def pulled_names() -> list[str]:
    """Names of all pulled models, whether they can be opened or not."""
    root = models_dir()
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if _NAME.match(p.name) and _has_manifest(p))


def find(name: str) -> Pulled | None:
    """The pulled model of this name."""
    directory = models_dir() / name
    return open_pulled(directory) if _NAME.match(name) and _has_manifest(directory) else None


def remove(name: str) -> int:
    """Delete a pulled model; returns the bytes that were freed. It is gone at once, by a rename."""
    directory = models_dir() / check_name(name)
    if not _has_manifest(directory):
        known = ", ".join(pulled_names()) or "none"
        raise ModelError(f"no pulled model {name!r}; there are: {known}")
    freed = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    doomed = models_dir() / f".{name}.{os.getpid()}.removed"
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return freed


def verify(pulled: Pulled, progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare every file's SHA-256 with the manifest's; returns the names of those that differ."""
    damaged = []
    for file in pulled.files:
        if sha256_file(pulled.directory / file.path) != file.sha256:
            damaged.append(file.path)
        if progress is not None:
            progress(file.bytes)
    return damaged


def _has_manifest(directory: Path) -> bool:
    return is_file(directory / MANIFEST_NAME) or is_file(directory / PAIR_NAME)
