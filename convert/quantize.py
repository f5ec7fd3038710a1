"""Quantisation through llama.cpp's own ``llama_model_quantize``."""

from __future__ import annotations

import ctypes
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from llava_edge import native
from llava_edge.convert.error_feedback import round_again
from llava_edge.convert.gguf_file import tensor_types as types_of_tensors
from llava_edge.convert.imatrix_file import read_correlations, read_imatrix
from llava_edge.errors import InputError, ModelError
from llava_edge.quant_types import LLM_TYPES, MMPROJ_TYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "LLM_TYPES",
    "MMPROJ_TYPES",
    "Quantized",
    "check_tensor_types",
    "check_type",
    "describe",
    "quantize",
    "require_tensors",
]

# K-quants pack 256 values of a row; where rows are no multiple of that, llama.cpp falls back tensor by tensor.
_BLOCK = 256
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_FLOATS = ("F32", "F16", "BF16")
# What a single tensor may be made of: llama.cpp's types, and those that its mixtures consist of.
_TENSOR_TYPES = (
    *_FLOATS,
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"),
)


@dataclass(frozen=True)
class Quantized:
    """What came out. ``fallbacks`` counts the tensors whose rows didn't fit ``type``; ``tensors`` counts by type.

    ``output_error`` is what :func:`llava_edge.convert.error_feedback.round_again` says, if it was used.
    """

    type: str
    bytes: int
    fallbacks: int
    tensors: dict[str, int]
    output_error: tuple[float, float] | None = None


def check_type(name: str, choices: Iterable[str]) -> str:
    """The type's name as llama.cpp spells it; InputError lists the choices."""
    known = {choice.lower(): choice for choice in choices}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {known[near[0]]}?" if near else None
    raise InputError(f"{name!r} is no type for this file; expected one of {', '.join(known.values())}", hint=hint)


def check_tensor_types(given: Mapping[str, str], type_name: str) -> dict[str, str]:
    """Types of single tensors by regular expressions for their names, with the types as llama.cpp spells them.

    InputError for what is no expression or no type, and where ``type_name`` says that nothing is quantised.
    """
    if given and type_name in _FLOATS:
        raise InputError(
            f"{type_name} quantises nothing, and {', '.join(given)} can have no other type",
            hint=f"Give a type such as Q8_0 in place of {type_name}.",
        )
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"{pattern!r} is no regular expression for tensors' names: {error}",
                hint=r"Give one such as ffn_down, token_embd or blk\.[0-3]\.attn_v.",
            ) from None
    return {pattern: check_type(kind, _TENSOR_TYPES) for pattern, kind in given.items()}


def require_tensors(source: Path, patterns: Iterable[str]) -> None:
    """InputError where one of the expressions is found in no tensor's name."""
    names = list(types_of_tensors(source))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            some = sorted({name.split(".")[-2] for name in names if name.endswith(".weight")})
            raise InputError(
                f"{source.name} has no tensor with {pattern} in its name",
                hint=f"It has, among others, {', '.join(some)}.",
            )


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
    tensor_types: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write ``source`` (a GGUF of floats) to ``target`` as ``type_name``, an element of ``LLM_TYPES``.

    ``imatrix`` is a file with an importance matrix; with correlations in it, levels are chosen by these
    (:mod:`llava_edge.convert.error_feedback`). ``tensor_types`` has other types for the tensors in whose name
    a key is found, as a regular expression; the first that is counts. ``progress`` hears the number of tensors done
    and of all.
    """
    library = native.llama()
    params = library.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = int(file_type(type_name))
    if imatrix is not None:
        kept = _imatrix_array(library, imatrix, source)
        params.imatrix = kept[0]
    if tensor_types:
        require_tensors(source, tensor_types)
        params.tt_overrides = _overrides(library, check_tensor_types(tensor_types, type_name))

    def tell(line: str) -> None:
        if progress and (found := _PROGRESS.search(line)):
            progress(int(found[1]), int(found[2]))

    native.forget_errors()
    with native.listening(tell):
        status = library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
    if status != 0:
        why = "; ".join(native.errors()) or "it says nothing"
        raise ModelError(f"llama.cpp could not quantise {source.name} to {type_name}: {why}")
    correlations = read_correlations(imatrix) if imatrix is not None else {}
    feedback = round_again(source, target, correlations, progress) if correlations else None
    return describe(target, type_name, tensor_types or (), feedback)


def describe(
    path: Path, type_name: str, chosen: Iterable[str] = (), feedback: tuple[float, float] | None = None
) -> Quantized:
    """Count the tensors of a file by type, and those that fell back from ``type_name``.

    Those that an expression in ``chosen`` finds have a type of their own.
    """
    own = tuple(chosen)
    types = types_of_tensors(path)
    block = _BLOCK if "_K" in type_name else 32
    fallbacks = [
        name
        for name, (kind, shape) in types.items()
        if type_name not in _FLOATS
        and kind not in ("F32", "BF16")
        and shape[0] % block
        and not _is_table(name)
        and not any(re.search(pattern, name) for pattern in own)
    ]
    counts = Counter(kind for kind, _ in types.values())
    return Quantized(type_name, path.stat().st_size, len(fallbacks), dict(sorted(counts.items())), feedback)


def _imatrix_array(library: Any, path: Path, source: Path) -> tuple[Any, list[NDArray[np.float32]]]:
    """llama.cpp's list of ``{name, data, size}`` that ends in NULL, and the memory that it points to."""
    matrix = read_imatrix(path)
    shapes = {name: shape for name, (_, shape) in types_of_tensors(source).items()}
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


def _overrides(library: Any, types: Mapping[str, str]) -> Any:
    """llama.cpp's list of ``{pattern, type}`` that ends in NULL."""
    entries = (library.llama_model_tensor_override * (len(types) + 1))()
    for entry, (pattern, kind) in zip(entries, types.items(), strict=False):
        entry.pattern = pattern.encode()
        entry.type = int(gguf.GGMLQuantizationType[kind])
    return entries


def _is_table(name: str) -> bool:
    return name == "token_embd.weight"
