"""The tower and projector of an mmproj file, run by llama.cpp's libmtmd.

libmtmd copies a picture that already has the tower's size, so a bundle's pictures are made exact before. Pictures of
a raw pair are handed over as they are, and what libmtmd puts around and between them is kept.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.engine import Engine, EngineError
from llava_edge.errors import ImageError, ModelError
from llava_edge.gguf_check import check_gguf
from llava_edge.vision import ImageChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

# Steps of the tower between two looks at whether the result is still wanted. A look costs nothing that can be measured.
_STEPS_BETWEEN_LOOKS = 40

_WIDTHS = re.compile(r"text model \(n_embd = (\d+)\) and mmproj \(n_embd = (\d+)\)")


class MtmdEncoder:
    """A vision tower that belongs to a loaded language model.

    Raises
    ------
    ModelError
        No such file, no vision tower in it, or a projector for another width of embeddings.
    """

    def __init__(self, path: str | os.PathLike[str], engine: Engine, *, n_threads: int | None = None) -> None:
        self.path = Path(path)
        self._engine = engine
        self._library = native.mtmd()
        self._context: Any = None
        check_gguf(self.path, "mmproj")
        params = self._library.mtmd_context_params_default()
        params.use_gpu = engine.n_gpu_layers != 0
        params.print_timings = False
        params.n_threads = n_threads or engine.n_threads
        params.warmup = False
        self._steps = 0
        params.cb_eval = self._callback = native.llama().ggml_backend_sched_eval_callback(self._go_on)
        native.forget_errors()
        start = functools.partial(
            self._library.mtmd_init_from_file, os.fsencode(self.path), engine.model_pointer, params
        )
        self._context = engine.worker.run(start)
        if not self._context:
            raise self._load_error()
        if not self._library.mtmd_support_vision(self._context):
            self.close()
            raise ModelError(f"{self.path} has no vision tower")

    def close(self) -> None:
        """Free the tower; a second call does nothing."""
        context, self._context = self._context, None
        if context:
            self._library.mtmd_free(context)

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Embeddings ``float32 [T, D]`` of RGB pictures; ModelError if this model puts more around them."""
        return [self._plain(self.encode_chunks(image)) for image in images]

    def encode_chunks(self, image: Image.Image) -> tuple[ImageChunk, ...]:
        """Everything that a picture becomes in this model's prompt, in order."""
        if not self._context:
            raise ModelError(f"the vision tower {self.path} is closed")
        _ = self._engine.model_pointer  # raises if the language model is closed
        with self._split(image) as chunks:
            return tuple(self._read(chunk) for chunk in chunks)

    @contextmanager
    def _split(self, image: Image.Image) -> Iterator[list[Any]]:
        library = self._library
        pixels = image.tobytes()
        data = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        bitmap = library.mtmd_bitmap_init(image.width, image.height, data)
        chunks = library.mtmd_input_chunks_init()
        try:
            part = library.mtmd_input_part(None, bitmap)
            parts = (ctypes.POINTER(library.mtmd_input_part) * 1)(ctypes.pointer(part))
            native.forget_errors()
            call = functools.partial(library.mtmd_tokenize_from_parts, self._context, chunks, parts, 1, False)
            if self._engine.worker.run(call) != 0:
                raise ImageError(f"the vision tower can't take a picture of {image.width} x {image.height}{_because()}")
            yield [library.mtmd_input_chunks_get(chunks, i) for i in range(library.mtmd_input_chunks_size(chunks))]
        finally:
            library.mtmd_input_chunks_free(chunks)
            library.mtmd_bitmap_free(bitmap)

    def _read(self, chunk: Any) -> ImageChunk:
        library = self._library
        kind = library.mtmd_input_chunk_get_type(chunk)
        count: int = library.mtmd_input_chunk_get_n_tokens(chunk)
        if kind == library.MTMD_INPUT_CHUNK_TYPE_TEXT:
            length = ctypes.c_size_t()
            tokens = library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
            return ImageChunk(count, count, tokens=tuple(tokens[: length.value]))
        native.forget_errors()
        status = self._engine.worker.run(functools.partial(library.mtmd_encode_chunk, self._context, chunk))
        if self._engine.stop_wanted:
            raise EngineError("the picture's evaluation was stopped")
        if status != 0:
            raise ModelError(f"the vision tower {self.path} failed{_because()}")
        embeddings = self._output(count)
        return ImageChunk(
            count,
            library.mtmd_input_chunk_get_n_pos(chunk),
            embeddings=embeddings,
            positions=self._positions(chunk, count),
            causal=not library.mtmd_decode_use_non_causal(self._context, chunk),
        )

    def _go_on(self, _tensor: Any, ask: bool, _data: Any) -> bool:
        """Libmtmd asks at each step whether to show its result, and after those that were shown whether to go on."""
        if not ask:
            return not self._engine.stop_wanted
        self._steps += 1
        return self._steps % _STEPS_BETWEEN_LOOKS == 0

    def _output(self, count: int) -> NDArray[np.float32]:
        pointer = self._library.mtmd_get_output_embd(self._context)
        embeddings: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (count, self._engine.n_embd)).copy()
        if not np.isfinite(embeddings).all():
            raise ModelError(f"the vision tower {self.path} gave values that are not numbers")
        return embeddings

    def _positions(self, chunk: Any, count: int) -> NDArray[np.int32] | None:
        """M-RoPE's sections in the order in which the language model reads them: time, row, column, unused."""
        if not self._library.mtmd_decode_use_mrope(self._context):
            return None
        tokens = self._library.mtmd_input_chunk_get_tokens_image(chunk)
        here, there = (self._positions_from(start, tokens, count) for start in (0, 1))
        if (there[:3] - here[:3] != 1).any():
            raise ModelError(f"{self.path} places its pictures in a way that is not supported (HunyuanVL's)")
        return here

    def _positions_from(self, start: int, tokens: Any, count: int) -> NDArray[np.int32]:
        places = (self._library.mtmd_decoder_pos * count)()
        self._library.mtmd_helper_image_get_decoder_pos(tokens, start, places)
        return np.array([[p.t, p.y, p.x, p.z] for p in places], np.int32).T

    def _plain(self, chunks: tuple[ImageChunk, ...]) -> NDArray[np.float32]:
        if len(chunks) != 1 or chunks[0].embeddings is None or not chunks[0].causal:
            raise ModelError(f"{self.path} is not a tower of LLaVA's kind: it marks or tiles its pictures")
        return chunks[0].embeddings

    def _load_error(self) -> ModelError:
        widths = _WIDTHS.search(" ".join(native.errors()))
        if widths:
            text, vision = widths.groups()
            return ModelError(
                f"{self.path} makes embeddings of width {vision}; the language model {self._engine.path} reads {text}",
                hint="Take the mmproj file that was made for this language model.",
            )
        return ModelError(
            f"{self.path} can't be loaded as a vision tower{_because()}",
            hint="Expected an mmproj GGUF: the file is damaged, or of another kind.",
        )


def _because() -> str:
    found = native.errors()
    return f": {found[-1].strip()}" if found else ""
