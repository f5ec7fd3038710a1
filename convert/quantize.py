"""Quantisation through llama.cpp's own ``llama_model_quantize``."""

from __future__ import annotations

import ctypes
import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf

from llava_edge import native
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.errors import InputError, ModelError

# K-quants pack 256 values of a row; where rows are no multiple of that, llama.cpp falls back tensor by tensor.
_BLOCK = 256
_FLOATS = ("F32", "F16", "BF16")
LLM_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q3_K_S", "IQ4_NL")
MMPROJ_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")


@dataclass(frozen=True)
class Quantized:
    """What came out. ``fallbacks`` counts the tensors whose rows didn't fit ``type``; ``tensors`` counts by type."""

    type: str
    bytes: int
    fallbacks: int
    tensors: dict[str, int]


def check_type(name: str, choices: tuple[str, ...]) -> str:
    """The type's name as llama.cpp spells it; InputError lists the choices."""
    known = {choice.lower(): choice for choice in choices}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.upper(), choices, n=1)
    hint = f"Did you mean {near[0]}?" if near else None
    raise InputError(f"{name!r} is no type for this file; expected one of {', '.join(choices)}", hint=hint)


def quantize(source: Path, target: Path, type_name: str, *, threads: int = 2, imatrix: Path | None = None) -> Quantized:
    """Write ``source`` (a GGUF of floats) to ``target`` as ``type_name``, an element of ``LLM_TYPES``."""
    library = native.llama()
    params = library.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = int(getattr(gguf.LlamaFileType, f"MOSTLY_{type_name}"))
    if type_name in ("Q4_K_M", "Q4_K_S") and not _word_embeddings_fit(source):
        # llama.cpp would take Q8_0 for a table that is a fifth of a small model and loses nothing by 5 bits.
        params.token_embedding_type = int(gguf.GGMLQuantizationType.Q5_0)
    native.forget_errors()
    if library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)) != 0:
        why = "; ".join(native.errors()) or "it says nothing"
        raise ModelError(f"llama.cpp could not quantise {source.name} to {type_name}: {why}")
    return describe(target, type_name)


def describe(path: Path, type_name: str) -> Quantized:
    """Count the tensors of a file by type, and those that fell back from ``type_name``."""
    types = tensor_types(path)
    block = _BLOCK if "_K" in type_name else 32
    fallbacks = [
        name
        for name, (kind, shape) in types.items()
        if type_name not in _FLOATS and kind not in ("F32", "BF16") and shape[0] % block and not _is_table(name)
    ]
    counts = Counter(kind for kind, _ in types.values())
    return Quantized(type_name, path.stat().st_size, len(fallbacks), dict(sorted(counts.items())))


def _is_table(name: str) -> bool:
    return name == "token_embd.weight"


def _word_embeddings_fit(path: Path) -> bool:
    _, shape = tensor_types(path).get("token_embd.weight", ("", (0,)))
    return shape[0] % _BLOCK == 0
