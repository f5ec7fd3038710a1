"""The language model: the only user of llama.cpp's text API.

Shapes: T tokens of a batch, D width of the embeddings, V size of the vocabulary, S sequences of a context.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.errors import InputError, LlavaEdgeError, ModelError
from llava_edge.gguf_check import check_gguf
from llava_edge.llama_batch import Batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

DEFAULT_CTX = 4096
DEFAULT_BATCH = 576  # a picture of LLaVA-1.5
KV_TYPES = {"f16": 1, "q8_0": 8}  # ggml's numbers
_FLASH_AUTO = -1
# Keys of our own in a GGUF, for what llama.cpp's tokenizer leaves out.
NFC_KEY = "llava_edge.tokenizer.nfc"
ONE_SPACE_KEY = "llava_edge.tokenizer.one_space_prefix"
# llama_token_attr, llama_vocab_type and ggml's rope types
_CONTROL, _USER_DEFINED, _RIGHT_STRIP = 1 << 3, 1 << 4, 1 << 8
_SPM = 1
_MROPE, _IMROPE = 8, 40
# Rows that ggml's kernels for repacked weights take at a time.
_ROWS_TOGETHER = 4


class EngineError(LlavaEdgeError):
    """llama.cpp could not evaluate a batch."""


class Engine:
    """A loaded GGUF language model with its KV cache.

    The cache holds ``n_seq_max`` sequences, each with ``n_ctx`` places of its own: in a pool that they share, a
    sequence's answers would depend on where in it the others lie. Calls that take ``seq`` work on that one.
    A call that fails or is interrupted leaves the cache as it was before; ``n_past`` is the position of sequence 0's
    next token (with M-RoPE a picture takes fewer positions than tokens). Another thread may set ``stopping`` to end
    an evaluation with an EngineError; it stays set until it is cleared.

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
    n_seq_max
        Sequences that the cache holds.
    repack
        Whether llama.cpp may keep a copy of the weights in an order that its kernels read faster. It never does where
        it was compiled for Intel's AMX; see :func:`native.multiplies_with_amx`.
    kv_type
        What keys and values are kept in: ``"f16"``, or ``"q8_0"`` in half the memory, which changes answers a little.
    flash_attention
        Whether attention is computed in one pass; None leaves it to llama.cpp. Values in ``q8_0`` need it.
    observer
        llama.cpp's evaluation callback, for measurements; the caller keeps it alive.
    every_output
        Compute logits of every token, so that all of them pass through the last layer; also for measurements.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        n_batch: int = DEFAULT_BATCH,
        n_seq_max: int = 1,
        repack: bool = True,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        observer: Any = None,
        every_output: bool = False,
    ) -> None:
        repack = repack and not native.multiplies_with_amx()
        if kv_type not in KV_TYPES:
            raise InputError(f"kv_type is {kv_type!r}; expected one of {', '.join(KV_TYPES)}")
        if kv_type != "f16" and flash_attention is False:
            raise InputError(f"kv_type {kv_type} needs flash attention", hint="Take f16, or leave flash attention on.")
        self.path = Path(path)
        self._settings: dict[str, str | int | bool | None] = {
            "kv_type": kv_type,
            "flash_attention": flash_attention,
            "repack": repack,
        }
        self.worker = native.Worker()
        self._library = native.llama()
        self._model: Any = None
        self._context: Any = None
        try:
            self.n_threads = n_threads or native.default_threads()
            self._load(n_gpu_layers, repack)
            self._make_context(n_ctx, n_batch, n_seq_max, observer, every_output)
        except BaseException:
            self.close()
            raise
        self.n_seq_max = n_seq_max
        names = ("n_ctx", "n_batch", "n_seq_max", "n_threads", "n_gpu_layers")
        self._settings.update({name: getattr(self, name) for name in names})
        self._past = [0] * n_seq_max
        self._batches = Batches(self._library, self.n_batch, n_seq_max, every_output)

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
    def settings(self) -> Mapping[str, str | int | bool | None]:
        """Everything besides the file on which the bits of an evaluation may depend, on one machine."""
        return self._settings

    @property
    def stop_wanted(self) -> bool:
        """Whether the evaluation that runs now has been asked to end, by ``stopping`` or Ctrl-C."""
        return self.worker.stopping or self.worker.aborting

    @property
    def stopping(self) -> bool:
        """Whether another thread wants what runs to end."""
        return self.worker.stopping

    @stopping.setter
    def stopping(self, wanted: bool) -> None:
        self.worker.stopping = wanted

    @property
    def model_pointer(self) -> Any:
        """llama.cpp's model, for its vision library."""
        self._check_open()
        return self._model

    @property
    def vocab_pointer(self) -> Any:
        """llama.cpp's vocabulary, for its grammars."""
        self._check_open()
        return self._vocab

    # The tokenizer

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. Only with ``special`` do the names of control tokens become these tokens."""
        if self._normalizes:
            text = unicodedata.normalize("NFC", text)
        if self._one_space and text.startswith((" ", "\u2581")):
            if len(text) == 1:  # llama.cpp would make two of it, and nothing of an empty text
                return self._tokenize("\n", special)[:1]
            text = text[1:]
        return self._tokenize(text, special)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            found = self._library.llama_tokenize(self.vocab_pointer, data, len(data), ids, room, False, special)
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
            length = self._library.llama_token_to_piece(self.vocab_pointer, token, buffer, room, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def token_text(self, token: int) -> str:
        """The token's entry in the vocabulary."""
        raw: bytes = self._library.llama_vocab_get_text(self.vocab_pointer, token) or b""
        return raw.decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether the vocabulary says that this token ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self.vocab_pointer, token))

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
        wanted = self._library.llama_vocab_get_add_bos(self.vocab_pointer)
        return self.token_text(self._library.llama_vocab_bos(self.vocab_pointer)) if wanted else ""

    @property
    def eos(self) -> str:
        """Text of the token that ends a text, empty if the model has none."""
        token = self._library.llama_vocab_eos(self.vocab_pointer)
        return self.token_text(token) if token >= 0 else ""

    @property
    def spm(self) -> bool:
        """Whether the vocabulary is SentencePiece's, whose words begin with their blank."""
        return bool(self._library.llama_vocab_type(self.vocab_pointer) == _SPM)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template in the file."""
        raw: bytes | None = self._library.llama_model_chat_template(self.model_pointer, None)
        return raw.decode("utf-8", "replace") if raw else None

    # Evaluation

    @property
    def n_past(self) -> int:
        """Position of the next token of sequence 0."""
        return self._past[0]

    def position(self, seq: int) -> int:
        """Position of the next token of a sequence."""
        return self._past[seq]

    def decode_tokens(self, tokens: Sequence[int], *, logits: bool = True, seq: int = 0) -> None:
        """Evaluate tokens after those in the cache. ``logits`` asks for those of the last one."""
        ids, past = self._checked(tokens), self._past[seq]
        self._decode_in_batches(
            len(ids), logits, seq, lambda a, b, want: self._batches.tokens(ids[a:b], past + a, seq, want)
        )
        self._past[seq] += len(ids)

    def decode_each(self, tokens: Mapping[int, int]) -> NDArray[np.float32]:
        """Evaluate one token for each of several sequences together, and return their logits ``float32 [S, V]``."""
        return self._decode_together({seq: (token,) for seq, token in tokens.items()}, 1)

    def decode_side_by_side(self, runs: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        """Evaluate a run of tokens for each of several sequences together; the logits after each, ``float32 [S, V]``.

        Runs are lengthened to the :meth:`padded` length of the longest, and what was added is forgotten; so many tokens
        have to fit ``n_batch``. All runs or none are in the cache afterwards.
        """
        return self._decode_together(runs, self.padded(max(map(len, runs.values()))))

    def padded(self, length: int) -> int:
        """A number of rows that llama.cpp's kernels for several rows take without a rest."""
        return -(-length // _ROWS_TOGETHER) * _ROWS_TOGETHER

    def _decode_together(self, runs: Mapping[int, Sequence[int]], length: int) -> NDArray[np.float32]:
        self._check_open()
        if len(runs) * length > self.n_batch:
            raise EngineError(f"{len(runs)} runs of {length} tokens; a batch holds {self.n_batch}")
        ids = np.array([[*self._checked(run), *[*run[-1:]] * (length - len(run))] for run in runs.values()], np.int32)
        ends = [row * length + len(run) - 1 for row, run in enumerate(runs.values())]
        past = {seq: self._past[seq] for seq in runs}
        try:
            self._decode(self._batches.side_by_side(ids, list(past.values()), list(runs), ends))
        except BaseException:
            for seq in runs:
                self.truncate(past[seq], seq)
            raise
        logits = np.empty((len(ends), self.n_vocab), np.float32)
        for copy, row in zip(logits, ends, strict=True):
            copy[:] = self._logits(row)
        for seq, run in runs.items():
            self._past[seq] = past[seq] + length
            if len(run) < length:
                self.truncate(past[seq] + len(run), seq)
        return logits

    def warm_up(self) -> None:
        """Evaluate a token and forget it: the weights' pages are then this process's, which otherwise the first
        question would wait for. Sequence 0 has to be empty.
        """
        self.decode_tokens((0,))
        self.truncate(0)

    def _checked(self, tokens: Sequence[int]) -> Sequence[int]:
        if not len(tokens) or min(tokens) < 0 or max(tokens) >= self.n_vocab:
            raise EngineError(f"tokens are {list(tokens)[:8]}; expected numbers from 0 to {self.n_vocab - 1}")
        return tokens

    def decode_embeddings(
        self,
        embeddings: NDArray[np.float32],
        *,
        positions: NDArray[np.int32] | None = None,
        n_pos: int | None = None,
        causal: bool = True,
        logits: bool = False,
        seq: int = 0,
    ) -> None:
        """Evaluate embeddings ``float32 [T, D]`` after what is in the cache.

        ``positions`` are those of M-RoPE, ``int32 [4, T]`` relative to the next one, and ``n_pos`` says by how much
        that moves on. Without ``causal`` every embedding sees all of them.
        """
        rows = np.ascontiguousarray(embeddings, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_embd or not len(rows):
            raise EngineError(f"embeddings have the shape {list(rows.shape)}; expected [tokens, {self.n_embd}]")
        if not causal and len(rows) > self.n_batch:
            raise EngineError(f"a picture of {len(rows)} tokens that all see each other needs n_batch = {len(rows)}")
        self._check_open()
        places = self._places(len(rows), positions, self._past[seq])
        self._library.llama_set_causal_attn(self._context, causal)
        make = self._batches.embeddings
        try:
            self._decode_in_batches(
                len(rows), logits, seq, lambda a, b, want: make(rows[a:b], places[:, a:b], seq, want)
            )
        finally:
            self._library.llama_set_causal_attn(self._context, True)
        self._past[seq] += len(rows) if n_pos is None else n_pos

    def _places(self, count: int, positions: NDArray[np.int32] | None, past: int) -> NDArray[np.int32]:
        """Positions of a picture: ``[1, T]``, or M-RoPE's ``[4, T]``, whose last section stays as it is."""
        line = np.arange(count, dtype=np.int32)
        if not self.uses_mrope:
            return (past + line)[None]
        sections = np.tile(line, (4, 1)) if positions is None else positions.copy()
        sections[:3] += past
        return sections

    def logits(self, row: int = -1) -> NDArray[np.float32]:
        """A copy of the last evaluated token's logits, or of a row of the last batch, ``float32 [V]``."""
        return self._logits(row).copy()

    def _logits(self, row: int) -> NDArray[np.float32]:
        """llama.cpp's own, which the next batch overwrites."""
        self._check_open()
        pointer = self._library.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise EngineError("there are no logits: the last batch was evaluated without them")
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))

    def truncate(self, n_past: int, seq: int = 0) -> bool:
        """Forget everything from a position on. False: the model can't, and the whole sequence is forgotten."""
        self._check_open()
        memory = self._library.llama_get_memory(self._context)
        remove = self._library.llama_memory_seq_rm
        kept = self.worker.run(lambda: bool(remove(memory, seq, n_past, -1)))
        if not kept:
            self.worker.run(lambda: remove(memory, seq, -1, -1))
        self._past[seq] = n_past if kept else 0
        return kept

    def state_size(self, seq: int) -> int:
        """Bytes that :meth:`save_state` needs."""
        self._check_open()
        return self.worker.run(lambda: int(self._library.llama_state_seq_get_size(self._context, seq)))

    def save_state(self, seq: int, buffer: Any) -> None:
        """Copy a sequence's part of the cache into a ctypes array of bytes. It holds no logits."""
        save = self._library.llama_state_seq_get_data
        if self.worker.run(lambda: save(self._context, buffer, len(buffer), seq)) != len(buffer):
            raise EngineError(f"the state of sequence {seq} does not fit {len(buffer)} bytes")

    def restore_state(self, seq: int, buffer: Any, n_past: int) -> None:
        """Put the first ``n_past`` positions of what :meth:`save_state` copied in place of what a sequence holds."""
        self._check_open()
        self.truncate(0, seq)
        restore = self._library.llama_state_seq_set_data
        if self.worker.run(lambda: restore(self._context, buffer, len(buffer), seq)) != len(buffer):
            self.truncate(0, seq)
            raise EngineError(f"the state of {len(buffer)} bytes does not belong to this model")
        self.truncate(n_past, seq)

    def _decode_in_batches(self, count: int, logits: bool, seq: int, make: Callable[[int, int, bool], Any]) -> None:
        self._check_open()
        starts = range(0, count, self.n_batch)
        try:
            for start in starts:
                end = min(count, start + self.n_batch)
                self._decode(make(start, end, logits and end == count))
        except BaseException:
            self.truncate(self._past[seq], seq)
            raise

    def _decode(self, batch: Any) -> None:
        status = self.worker.run(functools.partial(self._library.llama_decode, self._context, batch))
        if status != 0:
            raise EngineError(_explain_status(status))

    # Loading

    def _load(self, n_gpu_layers: int | None, repack: bool) -> None:
        library = self._library
        check_gguf(self.path, "llm")
        params = library.llama_model_default_params()
        if n_gpu_layers is None:
            n_gpu_layers = -1 if library.llama_supports_gpu_offload() else 0
        self.n_gpu_layers = params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = repack
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
        self._vocab = library.llama_model_get_vocab(self._model)
        self._normalizes = self._metadata(NFC_KEY) == "true"
        # The blank that llama.cpp puts in front of a text is one too many where there is one already.
        prefixed = self._metadata("tokenizer.ggml.add_space_prefix") == "true"
        self._one_space = prefixed and self._metadata(ONE_SPACE_KEY) == "true"
        self.n_vocab: int = library.llama_vocab_n_tokens(self._vocab)
        self.n_embd: int = library.llama_model_n_embd_inp(self._model)
        self.n_ctx_train: int = library.llama_model_n_ctx_train(self._model)
        self.uses_mrope: bool = library.llama_model_rope_type(self._model) in (_MROPE, _IMROPE)

    def _make_context(self, n_ctx: int | None, n_batch: int, n_seq_max: int, observer: Any, every_output: bool) -> None:
        library = self._library
        params = library.llama_context_default_params()
        places = n_ctx or min(DEFAULT_CTX, self.n_ctx_train)
        params.n_ctx = places * n_seq_max
        params.n_batch = params.n_ubatch = max(n_seq_max, min(n_batch, places))  # a batch may hold a row of each
        params.n_seq_max = n_seq_max
        # Only a sequence's last logits are ever read; the default reserves a row of the vocabulary for each token.
        params.n_outputs_max = params.n_batch if every_output else n_seq_max
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = n_seq_max == 1
        params.type_k = params.type_v = KV_TYPES[str(self._settings["kv_type"])]
        wanted = self._settings["flash_attention"]
        params.flash_attn_type = _FLASH_AUTO if wanted is None else int(wanted)
        params.no_perf = True
        params.abort_callback = ctypes.cast(native.flag_reader(), library.ggml_abort_callback)
        params.abort_callback_data = self.worker.stop_flag
        if observer is not None:
            params.cb_eval = observer
        native.forget_errors()
        self._context = self.worker.run(functools.partial(library.llama_init_from_model, self._model, params))
        if not self._context:
            raise ModelError(
                f"no room for a context of {params.n_ctx} tokens{_because()}",
                hint="Take a smaller n_ctx, or kv_type f16.",
            )
        self.n_ctx: int = library.llama_n_ctx_seq(self._context)
        if self.n_ctx > self.n_ctx_train:
            log.warning("a context of %d tokens; the model has learnt with %d", self.n_ctx, self.n_ctx_train)
        self.n_batch: int = library.llama_n_batch(self._context)

    def _metadata(self, key: str) -> str | None:
        """A value of the file's header as text."""
        buffer = ctypes.create_string_buffer(256)
        length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None

    def _attributes(self, token: int) -> int:
        return int(self._library.llama_vocab_get_attr(self.vocab_pointer, token))

    def _check_open(self) -> None:
        if not self._model:
            raise EngineError("the model is closed")


def _because() -> str:
    found = native.errors()
    return f": {found[0]}" if found else ""


def _explain_status(status: int) -> str:
    meanings = {1: "the context has no room for the batch", 2: "the evaluation was stopped", -1: "the batch is invalid"}
    return f"llama.cpp can't evaluate a batch: {meanings.get(status, f'status {status}')}"
