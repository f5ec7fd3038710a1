"""Quantisation through llama.cpp's own ``llama_model_quantize``."""

from __future__ import annotations

import ctypes
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from llava_edge import native
from llava_edge.convert.gguf_file import tensor_types
from llava_edge.errors import InputError, ModelError
from llava_edge.quant_types import LLM_TYPES, MMPROJ_TYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LLM_TYPES", "MMPROJ_TYPES", "Quantized", "check_type", "describe", "quantize"]

# K-quants pack 256 values of a row; where rows are no multiple of that, llama.cpp falls back tensor by tensor.
_BLOCK = 256
_FLOATS = ("F32", "F16", "BF16")
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


@dataclass(frozen=True)
class Quantized:
    """What came out. ``fallbacks`` counts the tensors whose rows didn't fit ``type``; ``tensors`` counts by type."""

    type: str
    bytes: int
    fallbacks: int
    tensors: dict[str, int]


def check_type(name: str, choices: Iterable[str]) -> str:
    """The type's name as llama.cpp spells it; InputError lists the choices."""
    known = {choice.lower(): choice for choice in choices}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {known[near[0]]}?" if near else None
    raise InputError(f"{name!r} is no type for this file; expected one of {', '.join(known.values())}", hint=hint)


def file_type(name: str) -> gguf.LlamaFileType:
    """What a GGUF file's header says of its types."""
    found: gguf.LlamaFileType = getattr(gguf.LlamaFileType, "ALL_F32" if name == "F32" else f"MOSTLY_{name}")
    return found


def quantize(
    source: Path,
    target: Path,
    type_name: str,
    *,
    threads: int = 2,
    imatrix: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write ``source`` (a GGUF of floats) to ``target`` as ``type_name``, an element of ``LLM_TYPES``.

    ``imatrix`` is a file with an importance matrix; ``progress`` hears the number of tensors done and of all.
    """
    library = native.llama()
    params = library.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = int(file_type(type_name))
    if type_name in ("Q4_K_M", "Q4_K_S") and not _word_embeddings_fit(source):
        # llama.cpp would take Q8_0 for a table that is a fifth of a small model and loses nothing by 5 bits.
        params.token_embedding_type = int(gguf.GGMLQuantizationType.Q5_0)
    if imatrix is not None:
        kept = _imatrix_array(library, imatrix, source)
        params.imatrix = kept[0]

    def tell(line: str) -> None:
        if progress and (found := _PROGRESS.search(line)):
            progress(int(found[1]), int(found[2]))

    native.forget_errors()
    with native.listening(tell):
        status = library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
    if status != 0:
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


def _imatrix_array(library: Any, path: Path, source: Path) -> tuple[Any, list[NDArray[np.float32]]]:
    """llama.cpp's list of ``{name, data, size}`` that ends in NULL, and the memory that it points to."""
    from llava_edge.convert.imatrix_file import read_imatrix

    matrix = read_imatrix(path)
    shapes = {name: shape for name, (_, shape) in tensor_types(source).items()}
    for name, values in matrix.items():
        if name in shapes and shapes[name][0] != len(values):
            raise InputError(
                f"{path} has {len(values)} values for {name}, whose rows have {shapes[name][0]}",
                hint="The importance matrix is of another model.",
            )
    if not set(matrix) & set(shapes):
        raise InputError(f"{path} has no tensor of this model", hint="The importance matrix is of another model.")
    entries = (library.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(values)
    return entries, list(matrix.values())


def _is_table(name: str) -> bool:
    return name == "token_embd.weight"


def _word_embeddings_fit(path: Path) -> bool:
    _, shape = tensor_types(path).get("token_embd.weight", ("", (0,)))
    return shape[0] % _BLOCK == 0
