"""What was computed once, on disk: embeddings of pictures and beginnings of prompts, by the hash of what made them.

An entry is a file that is named by its key, written beside and renamed. Nothing is synced: an entry that a power cut
has torn fails its checksum. Anything odd is a miss, never an answer, and a disk that is full costs the cache only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from llava_edge.errors import InputError
from llava_edge.paths import cache_dir, is_file

log = logging.getLogger(__name__)

Kind = Literal["embeddings", "prefixes", "hashes", "facts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Raise this when the same facts would give another result: another preprocessing, another layout of an entry.
FORMAT = 1
LIMIT_VARIABLE = "LLAVA_EDGE_CACHE_MB"
LIMIT_MB = 4096

Data: TypeAlias = bytes | memoryview

_MAGIC = b"LLAVAEC1"
_HEADER = struct.Struct("<8s32s32sQ")  # magic, key, SHA-256 of the payload, its length
_PARTIAL = ".new-"
_STALE_SECONDS = 600.0
_warned = False


def key_of(**facts: Any) -> str:
    """The key of what is made of these facts: SHA-256 of their JSON, as 64 hexadecimal digits."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def default_limit() -> int:
    """Bytes that the cache may take: ``LLAVA_EDGE_CACHE_MB`` megabytes, 0 switches it off."""
    text = os.environ.get(LIMIT_VARIABLE, str(LIMIT_MB))
    if not text.isascii() or not text.isdigit():
        raise InputError(f"{LIMIT_VARIABLE} is {text!r}; expected a whole number of megabytes, 0 for no cache")
    return int(text) * 1_000_000


@dataclass(frozen=True)
class Usage:
    """Entries of a kind and their bytes on disk."""

    entries: int = 0
    n_bytes: int = 0


@dataclass(frozen=True)
class _File:
    path: Path
    kind: Kind
    n_bytes: int
    used: float

    @property
    def being_written(self) -> bool:
        """Whether another process is at it; what a killed one has left is older."""
        return self.path.name.startswith(_PARTIAL) and self.used > time.time() - _STALE_SECONDS


class DiskCache:
    """Entries below a directory, up to ``limit`` bytes; the least recently used go first. Any number of processes may
    use it at a time.
    """

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        self.root = cache_dir() / "computed" if root is None else root
        self.limit = default_limit() if limit is None else limit

    def get(self, kind: Kind, key: str) -> memoryview | None:
        """The payload, in memory of its own; None if there is none that is good."""
        path = self._path(kind, key)
        try:
            found = self._read(path, bytes.fromhex(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, MemoryError) as error:
            log.debug("%s is ignored: %s", path, error)
            found = None
        if found is None:
            _discard(path)
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def has(self, kind: Kind, key: str) -> bool:
        """Whether there is an entry, good or not."""
        return is_file(self._path(kind, key))

    def put(self, kind: Kind, key: str, payload: Sequence[Data]) -> None:
        """Keep a payload, given in pieces, if the disk lets us."""
        size = _HEADER.size + sum(len(piece) for piece in payload)
        if size > self.limit:
            return
        path = self._path(kind, key)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(size, path)
            self._write(path, bytes.fromhex(key), payload)
        except OSError as error:
            _warn(self.root, error)

    def usage(self) -> dict[Kind, Usage]:
        """What there is, by kind."""
        found = dict.fromkeys(KINDS, Usage())
        for file in self._files():
            before = found[file.kind]
            found[file.kind] = Usage(before.entries + 1, before.n_bytes + file.n_bytes)
        return found

    def clear(self) -> Usage:
        """Delete everything; what was freed."""
        found = [file for file in self._files() if not file.being_written]
        freed = [file for file in found if _discard(file.path)]
        if len(freed) < len(found):
            log.warning("%d entries in %s can't be deleted", len(found) - len(freed), self.root)
        return Usage(len(freed), sum(file.n_bytes for file in freed))

    def _path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key

    def _read(self, path: Path, key: bytes) -> memoryview | None:
        # Without O_NONBLOCK a pipe of this name would keep us waiting.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            header = file.read(_HEADER.size)
            if not stat.S_ISREG(status.st_mode) or len(header) != _HEADER.size:
                return None
            magic, named, digest, length = _HEADER.unpack(header)
            whole = 0 < length <= self.limit and status.st_size == _HEADER.size + length
            if magic != _MAGIC or named != key or not whole:
                return None
            payload = memoryview(mmap.mmap(-1, length))
            done = 0
            while done < length and (count := file.readinto(payload[done:])):
                done += count
        return payload if done == length and hashlib.sha256(payload).digest() == digest else None

    def _write(self, path: Path, key: bytes, payload: Sequence[Data]) -> None:
        digest = hashlib.sha256()
        for piece in payload:
            digest.update(piece)
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, key, digest.digest(), sum(len(piece) for piece in payload)))
                for piece in payload:
                    file.write(piece)
            _replace(Path(name), path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def _make_room(self, size: int, replaced: Path) -> None:
        """Delete the least recently used until so many bytes more fit, and what killed processes have left."""
        files = sorted((file for file in self._files() if file.path != replaced), key=lambda file: file.used)
        total = sum(file.n_bytes for file in files)
        for file in files:
            left = file.path.name.startswith(_PARTIAL)
            if not file.being_written and (left or total + size > self.limit):
                _discard(file.path)
                total -= file.n_bytes

    def _files(self) -> Iterator[_File]:
        for kind in KINDS:
            try:
                entries = list(os.scandir(self.root / kind))
            except OSError:
                continue
            for entry in entries:
                with suppress(OSError):  # another process has deleted it
                    status = entry.stat(follow_symlinks=False)
                    yield _File(Path(entry.path), kind, status.st_size, status.st_mtime)


def _replace(new: Path, path: Path) -> None:
    try:
        new.replace(path)
    except OSError:
        if not path.is_dir():
            raise
        _discard(path)
        new.replace(path)


def _discard(path: Path) -> bool:
    """Delete an entry; False if the system refuses to."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            return not os.path.lexists(path)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _warn(root: Path, error: OSError) -> None:
    """Once a process: the person can't do anything about the next one either."""
    global _warned
    level = logging.DEBUG if _warned else logging.WARNING
    _warned = True
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "the disk is full" if full else error.strerror or str(error)
    log.log(level, "the cache in %s can't be written: %s; answers don't need it", root, why)
