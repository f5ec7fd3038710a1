"""The tower and projector of an mmproj file, run by libllava_edge where that is installed.

Its graph is right where libmtmd's is not (a class token, deeper projectors). The library is found by the environment
variable LLAVA_EDGE_LIBRARY, or among the system's. It uses the copies of libggml and libllama that this process has
loaded already.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.engine import Engine, EngineError
from llava_edge.errors import ModelError
from llava_edge.gguf_check import check_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


LIBRARY_VARIABLE = "LLAVA_EDGE_LIBRARY"
_FILE_NAME = "libllava_edge.dylib" if sys.platform == "darwin" else "libllava_edge.so"


class _Params(ctypes.Structure):
    """``llava_edge_tower_params``."""

    _fields_ = (("struct_size", ctypes.c_size_t), ("n_threads", ctypes.c_int32), ("use_gpu", ctypes.c_int32))


class NativeEncoder:
    """A vision tower that belongs to a loaded language model.

    Raises
    ------
    ModelError
        The library is not installed, no such file, a tower of another kind, or one for another width of embeddings.
    """

    def __init__(self, path: str | os.PathLike[str], engine: Engine, *, n_threads: int | None = None) -> None:
        self.path = Path(path)
        self._engine = engine
        self._library = _load()
        self._tower: Any = ctypes.c_void_p()
        check_gguf(self.path, "mmproj")
        params = _Params()
        self._library.llava_edge_tower_params_init(ctypes.byref(params))
        params.n_threads = n_threads or engine.n_threads
        params.use_gpu = int(engine.n_gpu_layers != 0)
        self._run("tower_load", os.fsencode(self.path), ctypes.byref(params), ctypes.byref(self._tower))
        facts = ("image_size", "n_tokens", "n_embd")
        self._size, *self._shape = (getattr(self._library, f"llava_edge_tower_{fact}")(self._tower) for fact in facts)
        if self._shape[1] != engine.n_embd:
            self.close()
            raise ModelError(
                f"{self.path} makes embeddings of width {self._shape[1]}; the language model reads {engine.n_embd}",
                hint="Take the mmproj file that was made for this language model.",
            )

    def close(self) -> None:
        """Free the tower; a second call does nothing."""
        tower, self._tower = self._tower, ctypes.c_void_p()
        self._library.llava_edge_tower_free(tower)

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Embeddings ``float32 [T, D]`` of RGB pictures of the tower's size."""
        return [self._encode(image) for image in images]

    def _encode(self, image: Image.Image) -> NDArray[np.float32]:
        if not self._tower:
            raise ModelError(f"the vision tower {self.path} is closed")
        if self._engine.stop_wanted:
            raise EngineError("the picture's evaluation was stopped")
        if image.size != (self._size, self._size):
            raise ModelError(f"the vision tower {self.path} takes {self._size} pixels a side, not {image.size}")
        embeddings = np.empty(self._shape, np.float32)
        out = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._run("tower_encode", self._tower, image.tobytes(), 0, out, embeddings.size)
        return embeddings

    def _run(self, name: str, *args: Any) -> None:
        """A function that returns a status, in the thread that computes; what it failed of is kept for each thread."""

        def call() -> str | None:
            if getattr(self._library, f"llava_edge_{name}")(*args) == 0:
                return None
            return str(self._library.llava_edge_last_error().decode("utf-8", "replace"))

        problem = self._engine.worker.run(call)
        if problem is not None:
            raise ModelError(problem, hint="Expected an mmproj GGUF with the tower of CLIP, SigLIP or DINOv2.")


def find_shared_library() -> str | None:
    """Where the library is, None if it is not installed."""
    given = os.environ.get(LIBRARY_VARIABLE)
    if given:
        return given
    beside = Path(sys.prefix) / "lib" / _FILE_NAME
    return str(beside) if beside.is_file() else ctypes.util.find_library("llava_edge")


def version() -> str:
    """The library's version and the file that it is, for the self-check's memory."""
    path = find_shared_library()
    text = _load().llava_edge_version().decode()
    status = Path(path).stat() if path and Path(path).is_file() else None
    return f"{text} {status.st_size} {status.st_mtime_ns}" if status else str(text)


@functools.cache
def _load() -> Any:
    path = find_shared_library()
    if path is None:
        raise ModelError(
            "libllava_edge is not installed, which the vision backend native needs",
            hint=f"Build it (docs/c-library.md), and set {LIBRARY_VARIABLE} to the file.",
        )
    native.llama()  # first: the library then finds llama.cpp's libraries loaded, and takes these
    try:
        library = ctypes.CDLL(path)
        library.llava_edge_tower_encode.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_float),
            ctypes.c_size_t,
        ]
        for name in ("free", "image_size", "n_tokens", "n_embd"):
            getattr(library, f"llava_edge_tower_{name}").argtypes = [ctypes.c_void_p]
        library.llava_edge_tower_free.restype = None
        for name in ("last_error", "version"):
            getattr(library, f"llava_edge_{name}").restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise ModelError(f"can't load {path}: {error}", hint=f"Set {LIBRARY_VARIABLE} to libllava_edge.") from None
    return library
