"""The language model: the only user of llama.cpp's text API.

Shapes: T tokens of a batch, D width of the embeddings, V size of the vocabulary. One sequence, number 0.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.errors import LlavaEdgeError, ModelError
from llava_edge.gguf_check import check_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

DEFAULT_CTX = 4096
# llama_token_attr, llama_vocab_type and ggml's rope types
_CONTROL, _USER_DEFINED, _RIGHT_STRIP = 1 << 3, 1 << 4, 1 << 8
_SPM = 1
_MROPE, _IMROPE = 8, 40


class EngineError(LlavaEdgeError):
    """llama.cpp could not evaluate a batch."""


class Engine:
    """A loaded GGUF language model with its KV cache.

    A call that fails or is interrupted leaves the cache as it was before; ``n_past`` is the position of the next
    token (with M-RoPE a picture takes fewer positions than tokens).

    Parameters
    ----------
    path
        The GGUF file.
    n_ctx
        Length of the context in tokens; None is the model's own, at most 4096.
    n_threads
        CPU threads; None is one a physical core.
    n_gpu_layers
        Layers on the GPU, -1 is all of them; None is all where llama.cpp was built for a GPU.
    n_batch
        Tokens that are evaluated together. A longer run is always cut at the same places.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        n_batch: int = 512,
    ) -> None:
        self.path = Path(path)
        self.worker = native.Worker()
        self._library = native.llama()
        self._model: Any = None
        self._context: Any = None
        try:
            self.n_threads = n_threads or native.default_threads()
            self._load(n_gpu_layers)
            self._make_context(n_ctx, n_batch)
        except BaseException:
            self.close()
            raise
        self.n_past = 0
        self._batches = _Batches(self._library, self.n_batch)

    def close(self) -> None:
        """Free the model; a second call does nothing."""
        context, self._context = self._context, None
        model, self._model = self._model, None
        if context:
            self.worker.run(functools.partial(self._library.llama_free, context))
        if model:
            self.worker.run(functools.partial(self._library.llama_model_free, model))
        self.worker.close()

    @property
    def model_pointer(self) -> Any:
        """llama.cpp's model, for its vision library."""
        self._check_open()
        return self._model

    @property
    def _vocab(self) -> Any:
        self._check_open()
        return self._vocab_pointer

    # The tokenizer

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. Only with ``special`` do the names of control tokens become these tokens."""
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            found = self._library.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
            if found >= 0:
                return list(ids[:found])
            if found == -(1 << 31):
                raise EngineError(f"a text of {len(data)} bytes is too long for the tokenizer")
            room = -found

    def piece(self, token: int) -> bytes:
        """What a token adds to the answer, in UTF-8; part of a character may be cut off. Control tokens add nothing."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = self._library.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def token_text(self, token: int) -> str:
        """The token's entry in the vocabulary."""
        raw: bytes = self._library.llama_vocab_get_text(self._vocab, token) or b""
        return raw.decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether the vocabulary says that this token ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether this token stands for structure, not for text."""
        return bool(self._attributes(token) & _CONTROL) or self.is_end(token)

    def is_user_defined(self, token: int) -> bool:
        """Whether llama.cpp makes this token of its name in any text."""
        return bool(self._attributes(token) & _USER_DEFINED)

    def strips_right(self, token: int) -> bool:
        """Whether blanks after this token belong to it."""
        return bool(self._attributes(token) & _RIGHT_STRIP)

    @property
    def bos(self) -> str:
        """Text of the token that begins every prompt, empty if the model has none."""
        wanted = self._library.llama_vocab_get_add_bos(self._vocab)
        return self.token_text(self._library.llama_vocab_bos(self._vocab)) if wanted else ""

    @property
    def eos(self) -> str:
        """Text of the token that ends a text, empty if the model has none."""
        token = self._library.llama_vocab_eos(self._vocab)
        return self.token_text(token) if token >= 0 else ""

    @property
    def spm(self) -> bool:
        """Whether the vocabulary is SentencePiece's, whose words begin with their blank."""
        return bool(self._library.llama_vocab_type(self._vocab) == _SPM)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template in the file."""
        raw: bytes | None = self._library.llama_model_chat_template(self.model_pointer, None)
        return raw.decode("utf-8", "replace") if raw else None

    # Evaluation

    def decode_tokens(self, tokens: Sequence[int], *, logits: bool = True) -> None:
        """Evaluate tokens after those in the cache. ``logits`` asks for those of the last one."""
        ids = np.asarray(tokens, np.int32)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.n_vocab:
            raise EngineError(f"tokens are {list(tokens)[:8]}; expected numbers from 0 to {self.n_vocab - 1}")
        self._decode_in_batches(
            len(ids), logits, lambda a, b, want: self._batches.tokens(ids[a:b], self.n_past + a, want)
        )
        self.n_past += len(ids)

    def decode_embeddings(
        self,
        embeddings: NDArray[np.float32],
        *,
        positions: NDArray[np.int32] | None = None,
        n_pos: int | None = None,
        causal: bool = True,
        logits: bool = False,
    ) -> None:
        """Evaluate embeddings ``float32 [T, D]`` after what is in the cache.

        ``positions`` are those of M-RoPE, ``int32 [4, T]`` relative to ``n_past``, and ``n_pos`` says by how much
        ``n_past`` moves on. Without ``causal`` every embedding sees all of them.
        """
        rows = np.ascontiguousarray(embeddings, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_embd or not len(rows):
            raise EngineError(f"embeddings have the shape {list(rows.shape)}; expected [tokens, {self.n_embd}]")
        if not causal and len(rows) > self.n_batch:
            raise EngineError(f"a picture of {len(rows)} tokens that all see each other needs n_batch = {len(rows)}")
        self._check_open()
        places = self._places(len(rows), positions)
        self._library.llama_set_causal_attn(self._context, causal)
        try:
            self._decode_in_batches(
                len(rows), logits, lambda a, b, want: self._batches.embeddings(rows[a:b], places[:, a:b], want)
            )
        finally:
            self._library.llama_set_causal_attn(self._context, True)
        self.n_past += len(rows) if n_pos is None else n_pos

    def _places(self, count: int, positions: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Positions of a picture: ``[1, T]``, or M-RoPE's ``[4, T]``, whose last section stays as it is."""
        line = np.arange(count, dtype=np.int32)
        if not self.uses_mrope:
            return (self.n_past + line)[None]
        sections = np.tile(line, (4, 1)) if positions is None else positions.copy()
        sections[:3] += self.n_past
        return sections

    def logits(self) -> NDArray[np.float32]:
        """A copy of the last evaluated token's logits, ``float32 [V]``."""
        self._check_open()
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        if not pointer:
            raise EngineError("there are no logits: the last batch was evaluated without them")
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def truncate(self, n_past: int) -> bool:
        """Forget everything from a position on. False: the model can't, and everything is forgotten."""
        self._check_open()
        memory = self._library.llama_get_memory(self._context)
        kept = self.worker.run(lambda: bool(self._library.llama_memory_seq_rm(memory, 0, n_past, -1)))
        if not kept:
            self.worker.run(lambda: self._library.llama_memory_clear(memory, True))
        self.n_past = n_past if kept else 0
        return kept

    def _decode_in_batches(self, count: int, logits: bool, make: Callable[[int, int, bool], Any]) -> None:
        self._check_open()
        starts = range(0, count, self.n_batch)
        try:
            for start in starts:
                end = min(count, start + self.n_batch)
                batch = make(start, end, logits and end == count)
                status = self.worker.run(functools.partial(self._library.llama_decode, self._context, batch))
                if status != 0:
                    raise EngineError(_explain_status(status))
        except BaseException:
            self.truncate(self.n_past)
            raise

    # Loading

    def _load(self, n_gpu_layers: int | None) -> None:
        library = self._library
        check_gguf(self.path, "llm")
        params = library.llama_model_default_params()
        if n_gpu_layers is None:
            n_gpu_layers = -1 if library.llama_supports_gpu_offload() else 0
        self.n_gpu_layers = params.n_gpu_layers = n_gpu_layers
        self._progress = library.llama_progress_callback(lambda _share, _data: not self.worker.aborting)
        params.progress_callback = self._progress
        native.forget_errors()
        load = functools.partial(library.llama_model_load_from_file, os.fsencode(self.path), params)
        self._model = self.worker.run(load)
        if not self._model:
            raise ModelError(
                f"{self.path} can't be loaded as a language model{_because()}",
                hint="The file is damaged, not a language model, or needs a newer llama.cpp.",
            )
        if library.llama_model_has_encoder(self._model) or not library.llama_model_has_decoder(self._model):
            raise ModelError(f"{self.path} is not a decoder-only language model")
        self._vocab_pointer = library.llama_model_get_vocab(self._model)
        self.n_vocab: int = library.llama_vocab_n_tokens(self._vocab_pointer)
        self.n_embd: int = library.llama_model_n_embd_inp(self._model)
        self.n_ctx_train: int = library.llama_model_n_ctx_train(self._model)
        self.uses_mrope: bool = library.llama_model_rope_type(self._model) in (_MROPE, _IMROPE)

    def _make_context(self, n_ctx: int | None, n_batch: int) -> None:
        library = self._library
        params = library.llama_context_default_params()
        params.n_ctx = n_ctx or min(DEFAULT_CTX, self.n_ctx_train)
        params.n_batch = params.n_ubatch = min(n_batch, params.n_ctx)
        params.n_seq_max = 1
        # Only the last token's logits are ever read; the default reserves a row of the vocabulary for each token.
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = True
        params.no_perf = True
        self._abort = library.ggml_abort_callback(lambda _data: self.worker.aborting)
        params.abort_callback = self._abort
        native.forget_errors()
        self._context = self.worker.run(functools.partial(library.llama_init_from_model, self._model, params))
        if not self._context:
            raise ModelError(
                f"no room for a context of {params.n_ctx} tokens{_because()}", hint="Take a smaller n_ctx."
            )
        self.n_ctx: int = library.llama_n_ctx_seq(self._context)
        if self.n_ctx > self.n_ctx_train:
            log.warning("a context of %d tokens; the model has learnt with %d", self.n_ctx, self.n_ctx_train)
        self.n_batch: int = library.llama_n_batch(self._context)

    def _attributes(self, token: int) -> int:
        return int(self._library.llama_vocab_get_attr(self._vocab, token))

    def _check_open(self) -> None:
        if not self._model:
            raise EngineError("the model is closed")


class _Batches:
    """llama.cpp's batches over NumPy memory. A batch is valid until the next one is made."""

    def __init__(self, library: Any, size: int) -> None:
        self._library = library
        self._counts = np.ones(size, np.int32)
        self._sequence = ctypes.c_int32(0)
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._sequences = (pointer * size)(*[ctypes.pointer(self._sequence)] * size)
        self._outputs = np.zeros(size, np.int8)
        self._held: tuple[NDArray[Any], ...] = ()

    def tokens(self, ids: NDArray[np.int32], start: int, logits: bool) -> Any:
        batch = self._batch(len(ids), np.arange(start, start + len(ids)), logits, ids)
        batch.token = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        return batch

    def embeddings(self, rows: NDArray[np.float32], places: NDArray[np.int32], logits: bool) -> Any:
        batch = self._batch(len(rows), places, logits, rows)
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return batch

    def _batch(self, count: int, places: NDArray[Any], logits: bool, data: NDArray[Any]) -> Any:
        positions = np.ascontiguousarray(places, np.int32)
        self._outputs[:count] = 0
        self._outputs[count - 1] = logits
        self._held = (positions, data)
        batch = self._library.llama_batch()
        batch.n_tokens = count
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = self._sequences
        batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        return batch


def _because() -> str:
    found = native.errors()
    return f": {found[0]}" if found else ""


def _explain_status(status: int) -> str:
    meanings = {1: "the context has no room for the batch", 2: "the evaluation was stopped", -1: "the batch is invalid"}
    return f"llama.cpp can't evaluate a batch: {meanings.get(status, f'status {status}')}"
