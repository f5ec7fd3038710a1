"""What a model finds on disk of its earlier work: embeddings of pictures, and the KV cache up to a picture's end.

Keys hold everything on which the bits may depend: the picture's pixels and how they were prepared, the content of the
model's files, the libraries, the processor's features and the engine's settings. What was found is what would have been
computed, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import struct
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge import native
from llava_edge.cache import DiskCache, key_of
from llava_edge.errors import LlavaEdgeError
from llava_edge.kv_cache import Entry, entries_of
from llava_edge.prompt import ImageRef, TokenRun, Unit, up_to_pictures
from llava_edge.vision.packed import digest, pack, unpack

if TYPE_CHECKING:
    from llava_edge.engine import Engine
    from llava_edge.kv_cache import KvCache, Prefill
    from llava_edge.types import ImageSpec
    from llava_edge.vision import EncodedImage

log = logging.getLogger(__name__)

_MOST_PENDING = 8
_PLACE = struct.Struct("<QQ")  # tokens and position at the prefix's end
_LIBRARIES = {"mtmd": "llama-cpp-python", "onnx": "onnxruntime"}  # native: see _backend_version


class Remembered:
    """One model's entries in the cache on disk. Writing happens in a thread of its own.

    ``files`` are the model's files with the SHA-256 that a manifest lists; None is worked out after the first answer,
    and remembered by the file's path, size and time.
    """

    def __init__(self, cache: DiskCache, engine: Engine, files: Mapping[Path, str | None]) -> None:
        self._cache = cache
        self._engine = engine
        self._files = files
        self._machine = [platform.system(), platform.machine(), _features(), native.version()]
        self._seen = {path: _stamp(path) for path in files}  # as they were when they were loaded
        self._identities: list[list[Any]] | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()
        self._copy: Future[None] | None = None  # the KV cache that is being written
        self._unwritten: tuple[str, list[bytes | memoryview]] | None = None
        self._identify(may_read=False)

    def close(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    # What was measured

    def fact(self, name: str) -> bytes | None:
        """What was noted of this model on this machine with these settings."""
        found = None if self._identities is None else self._cache.get("facts", self._fact_key(name))
        return None if found is None else bytes(found)

    def keep_fact(self, name: str, text: str) -> None:
        """Note it."""
        if self._identities is not None:
            self._cache.put("facts", self._fact_key(name), [text.encode()])

    def _fact_key(self, name: str) -> str:
        return key_of(fact=name, files=self._identities, machine=self._machine, settings=dict(self._engine.settings))

    # Pictures

    def picture_key(
        self, picture: str, spec: ImageSpec | None, image_tokens: int | None, backend: str, reduction: str = "pool"
    ) -> str | None:
        """The key of a picture's embeddings; None while what makes them is not known for sure."""
        try:
            version = _backend_version(backend)
        except LlavaEdgeError:  # no such library: opening the tower will say so, or take another one
            return None
        if self._identities is None:
            return None
        return key_of(
            picture=picture,
            spec=None if spec is None else asdict(spec),
            backend=[backend, version],
            image_tokens=image_tokens,
            reduction=reduction,
            files=self._identities,
            machine=self._machine,
            threads=self._engine.n_threads,
            gpu=self._engine.n_gpu_layers,
        )

    def picture(self, name: str, key: str | None) -> EncodedImage | None:
        """The embeddings that were kept under a key, as the picture ``name``."""
        found = None if key is None else self._cache.get("embeddings", key)
        if found is None:
            return None
        try:
            return unpack(name, found, self._engine.n_embd)
        except (ValueError, KeyError, TypeError) as error:  # written by a version that had a defect
            log.debug("embeddings on disk are ignored: %s", error)
            return None

    def keep_picture(self, key: str | None, image: EncodedImage) -> None:
        """Write embeddings, later."""
        if key is None:
            self._submit(self._identify, True)
        else:
            self._submit(self._cache.put, "embeddings", key, pack(image))

    # Beginnings of prompts

    def restore(self, kv: KvCache, units: Sequence[Unit], images: Mapping[str, EncodedImage]) -> None:
        """Put the longest beginning that is on disk and ends with a picture into the cache, if it lacks that."""
        ends = _picture_ends(units)
        if not ends or kv.common(units) >= ends[-1] or self._identities is None:
            return
        entries, digests = entries_of(units, images), {key: digest(image) for key, image in images.items()}
        for count in reversed(ends):
            if kv.common(units) >= count:
                return
            found = self._cache.get("prefixes", self._prefix_key(units[:count], digests))
            if found is not None and _adopt(kv, found, entries[:count]):
                return

    def keeping(
        self,
        kv: KvCache,
        units: Sequence[Unit],
        images: Mapping[str, EncodedImage],
        steps: Generator[None, None, Prefill],
    ) -> Generator[None, None, Prefill]:
        """The steps of a prompt or its beginning, with a copy of the cache where the last picture ends.

        What follows, the question, is not in the copy. :meth:`write_prefix` writes it, for other processes.
        """
        end = len(up_to_pictures(units[:-1]))
        while True:
            done = None
            try:
                next(steps)
            except StopIteration as stop:
                done = stop
            if end and len(kv.entries) == end:
                self._copy_prefix(kv, units[:end], images)
            if done is not None:
                prefill: Prefill = done.value
                return prefill
            yield

    def _copy_prefix(self, kv: KvCache, units: Sequence[Unit], images: Mapping[str, EncodedImage]) -> None:
        if self._identities is None:
            return
        key = self._prefix_key(units, {key: digest(image) for key, image in images.items()})
        # A second copy would be held in memory while the first one is being written.
        if (self._copy is not None and not self._copy.done()) or self._cache.has("prefixes", key):
            return
        try:
            place = _PLACE.pack(kv.entries[-1].tokens, kv.entries[-1].end)
            self._unwritten = (key, [place, kv.save().data])
        except (LlavaEdgeError, OSError, MemoryError) as error:  # the answer goes on without
            log.debug("this part of the KV cache is not kept: %s", error)

    def write_prefix(self) -> None:
        """Write the last copy, in the thread for that: best once the first word is out."""
        if self._unwritten is not None:
            (key, parts), self._unwritten = self._unwritten, None
            self._copy = self._submit(self._cache.put, "prefixes", key, parts)

    def _prefix_key(self, units: Sequence[Unit], digests: Mapping[str, str]) -> str:
        listed = [list(unit.ids) if isinstance(unit, TokenRun) else digests[unit.key] for unit in units]
        return key_of(units=listed, files=self._identities, machine=self._machine, settings=dict(self._engine.settings))

    def _submit(self, call: Any, *arguments: Any) -> Future[None] | None:
        """Have it done in the writer's thread; not at all if that is far behind, because what waits takes memory."""
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if len(self._pending) >= _MOST_PENDING:
            return None
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "llava-edge-cache")
        self._pending.append(self._writer.submit(call, *arguments))
        return self._pending[-1]

    def _identify(self, may_read: bool) -> None:
        """What tells the model's files from all others; reads them if need be and if it may."""
        found = []
        try:
            for path, listed in self._files.items():
                status = path.stat()
                facts: list[Any] = [status.st_size, status.st_mtime_ns]
                content = listed or self._hash_of(path, facts, may_read)
                if content is None or _stamp(path) != self._seen[path]:  # another file lies there now
                    return
                found.append([content, *(facts if listed else ())])
        except (OSError, LlavaEdgeError) as error:
            log.debug("nothing is remembered of this model: %s", error)
            return
        self._identities = found

    def _hash_of(self, path: Path, facts: Sequence[Any], may_read: bool) -> str | None:
        """The content's hash, from the cache if the file was read before."""
        key = key_of(file=str(path.resolve()), facts=list(facts))
        known = self._cache.get("hashes", key)
        if known is not None:
            return bytes(known).decode("ascii", "replace")
        if not may_read:
            return None
        from llava_edge.bundle import sha256_file

        content = sha256_file(path)
        self._cache.put("hashes", key, [content.encode()])
        return content


def _backend_version(backend: str) -> str:
    if backend == "native":
        from llava_edge.vision.native import version

        return version()
    return _version(_LIBRARIES[backend])


@functools.cache
def _version(distribution: str) -> str:
    return metadata.version(distribution)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _features() -> str:
    found: bytes = native.llama().llama_print_system_info()
    return found.decode("utf-8", "replace")


def _picture_ends(units: Sequence[Unit]) -> list[int]:
    """How many units there are up to each picture's end. The last unit is never kept, because its logits are needed."""
    return [number for number, unit in enumerate(units[:-1], 1) if isinstance(unit, ImageRef)]


def _adopt(kv: KvCache, found: memoryview, entries: Sequence[Entry]) -> bool:
    if len(found) <= _PLACE.size or _PLACE.unpack(found[: _PLACE.size]) != (entries[-1].tokens, entries[-1].end):
        return False
    size = len(found) - _PLACE.size
    return kv.adopt((ctypes.c_uint8 * size).from_buffer(found, _PLACE.size), entries)
