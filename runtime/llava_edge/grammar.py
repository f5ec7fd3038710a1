"""Answers that match a JSON schema: llama.cpp's grammars, asked before a token is chosen."""

from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.engine import Engine
    from llava_edge.generate import Chooser

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 24
MAX_REPEAT = 512
MAX_GRAMMAR_BYTES = 256 * 1024
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength")
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def from_schema(schema: dict[str, Any]) -> str:
    """The grammar, in llama.cpp's notation, of the JSON texts that match a schema.

    Raises
    ------
    InputError
        The schema is none, uses what can't be expressed, or is beyond the limits that keep the grammar quick.
    """
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise InputError(f"the JSON schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are allowed")
    _check(schema, 0)
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = str(json_schema_to_gbnf(text))
    except Exception as error:  # the converter fails in every way on schemas that it does not know
        raise InputError(f"the JSON schema can't be used: {type(error).__name__}") from None
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise InputError("the JSON schema allows too many texts to be checked quickly", hint="Make it simpler.")
    return grammar


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    if not isinstance(value, dict):
        return
    if "pattern" in value:
        raise InputError("the JSON schema has a pattern, which is not supported", hint="List the texts with enum.")
    reference = value.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise InputError("the JSON schema refers to another document; only references that begin with # are followed")
    for name in _REPEATS:
        count = value.get(name, 0)
        if isinstance(count, (int, float)) and not 0 <= count <= MAX_REPEAT:
            raise InputError(f"the JSON schema's {name} is {count}; expected 0 to {MAX_REPEAT}")
    for item in value.values():
        _check(item, depth + 1)


class GrammarSampler:
    """Chooses tokens as another sampler does, among those that the grammar allows. To be closed after use."""

    def __init__(self, engine: Engine, grammar: str, sampler: Chooser) -> None:
        self._library = native.llama()
        self._engine = engine
        self._sampler = sampler
        native.forget_errors()
        self._grammar = self._library.llama_sampler_init_grammar(engine.vocab_pointer, grammar.encode(), b"root")
        if not self._grammar:
            raise InputError("the JSON schema can't be used: llama.cpp does not take its grammar")
        self._data = np.zeros(engine.n_vocab, _TOKEN_DATA)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. What the sampler would take is tried first, for that is quick."""
        token = self._sampler.choose(logits)
        if not np.isfinite(self._masked(np.array([token]), logits)[0]):
            masked = self._masked(np.arange(len(logits)), logits)
            token = self._sampler.choose(masked)
        if not self._engine.is_end(token):
            self._library.llama_sampler_accept(self._grammar, token)
        return token

    def close(self) -> None:
        """Free the grammar; a second call does nothing."""
        grammar, self._grammar = self._grammar, None
        if grammar:
            self._library.llama_sampler_free(grammar)

    def _masked(self, ids: NDArray[Any], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of some tokens, minus infinity where the grammar forbids them."""
        data = self._data[: len(ids)]
        data["id"], data["logit"] = ids, logits[ids]
        array = self._library.llama_token_data_array()
        array.data = data.ctypes.data_as(ctypes.POINTER(self._library.llama_token_data))
        array.size, array.selected, array.sorted = len(ids), -1, False
        self._library.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return data["logit"].copy()
