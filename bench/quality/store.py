"""What a pass over the data leaves on disk: reference logits and pictures' embeddings. Anything odd is a miss."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zlib
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import cache, native
from llava_edge.bench.environment import package_version
from llava_edge.bench.record import write_atomically
from llava_edge.errors import InputError, ModelError
from llava_edge.vision import EncodedImage
from llava_edge.vision import native as native_library

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.bench.models import Subject
    from llava_edge.model import Model


def key_of(facts: Any) -> str:
    """A name for everything on which a result depends."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def compact(logits: NDArray[np.float32]) -> NDArray[np.float16]:
    """Logits ``[T, V]`` below each row's greatest, in float16.

    Reference and candidate are rounded alike, so that a model's divergence from itself stays 0. The error is
    largest where the probability is least: it moves a divergence by about one millionth of a nat.
    """
    shifted = np.maximum(logits - logits.max(axis=1, keepdims=True), np.finfo(np.float16).min)
    halves: NDArray[np.float16] = shifted.astype(np.float16)
    return halves


class LogitStore:
    """Compact logits, one compressed file a case."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def save(self, number: int, rows: NDArray[np.float16]) -> None:
        """Keep a case's rows ``[T, V]``. High and low bytes are compressed apart, because the high ones repeat."""
        planes = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 2).T
        with written(self._path(number)) as path:
            write_atomically(path, zlib.compress(planes.tobytes(), 1))

    def load(self, number: int, shape: tuple[int, int]) -> NDArray[np.float16] | None:
        """A case's rows, None if they are not there, damaged, or of another shape."""
        try:
            planes = np.frombuffer(zlib.decompress(self._path(number).read_bytes()), np.uint8).reshape(2, -1)
        except (OSError, ValueError, zlib.error):
            return None
        if planes.shape[1] != shape[0] * shape[1]:
            return None
        rows: NDArray[np.float16] = np.ascontiguousarray(planes.T).view(np.float16).reshape(shape)
        return rows

    def has(self, number: int) -> bool:
        """Whether there is a file for the case."""
        return self._path(number).is_file()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.logits"


class EmbeddingStore:
    """Embeddings of pictures by what made them: bundles with the same tower share one pass over the pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, model: Model, subject: Subject, picture: Path) -> EncodedImage:
        """The picture as the model reads it, from disk where it is there."""
        manifest = subject.bundle.manifest
        tower = [file.sha256 for file in manifest.files if file.role != "llm"]
        backend = model.open_vision()
        read = [manifest.image, manifest.feature_layers, subject.image_tokens, backend, versions([backend])]
        folder = make_folder(self._folder / key_of([tower, *read, model.engine.n_threads]))
        path = folder / f"{key_of([str(picture.resolve()), picture.stat().st_mtime_ns])}.npy"
        try:
            return EncodedImage.of(str(picture), np.load(path))
        except (OSError, ValueError, EOFError):
            pass
        (chunk,) = model.encode(model.open_picture(picture)).chunks
        if chunk.embeddings is None or chunk.positions is not None or not chunk.causal:
            raise ModelError(f"{subject.label} marks its pictures in a way that is not supported here")
        with written(path):
            data = io.BytesIO()
            np.save(data, chunk.embeddings)
            write_atomically(path, data.getvalue())
        return EncodedImage.of(str(picture), chunk.embeddings)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """While a file is written: InputError where that fails."""
    try:
        yield path
    except OSError as error:
        raise InputError(
            f"can't write {path}: {error.strerror}",
            hint="Make room; what is finished is kept, the same command goes on.",
        ) from None


def versions(backends: Collection[str]) -> list[str]:
    """Of what computes embeddings and logits, and of what prepares pictures, with the vision backends in question."""
    found = [
        native.version(),
        native.llama().llama_print_system_info().decode("utf-8", "replace"),
        version("onnxruntime"),
        package_version("llava-edge"),
        str(cache.FORMAT),
    ]
    if "native" in backends:
        with contextlib.suppress(ModelError):  # a library that can't be loaded computes nothing
            found.append(native_library.version())
    return found


def make_folder(path: Path) -> Path:
    """The folder, made where it wasn't."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder {path}: {error.strerror}") from None
    return path
