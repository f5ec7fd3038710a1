"""Importance matrices on disk, in the GGUF format of llama.cpp.

For every matrix of the model two tensors: ``NAME.in_sum2``, the sums of its inputs' squares, and ``NAME.counts``, how
many inputs there were. If asked for, sums of products of any two inputs as well, ``NAME.in_outer``, ``[columns,
columns]``; matrices that read the same inputs share one, as the key ``llava_edge.same_inputs`` says. llama.cpp knows
neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUMS, _COUNTS, _OUTER = ".in_sum2", ".counts", ".in_outer"
_SAME = "llava_edge.same_inputs"


@dataclass
class Sums:
    """Weighted sums of squares ``[columns]`` of a matrix's inputs, and the sum of the weights."""

    squares: NDArray[np.float64]
    count: float = 0.0


def write_imatrix(
    path: Path,
    sums: Mapping[str, Sums],
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
    outer: Mapping[str, NDArray[np.float32]] | None = None,
    same: Mapping[str, str] | None = None,
) -> None:
    """Write the file under a temporary name, then rename it.

    ``outer`` has the sums of products of some matrices, ``same`` which of these another matrix shares.
    """
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, entry in sorted(sums.items()):
        writer.add_tensor(name + _SUMS, entry.squares.astype(np.float32)[None])
        writer.add_tensor(name + _COUNTS, np.array([[entry.count]], np.float32))
    for name, products in sorted((outer or {}).items()):
        writer.add_tensor(name + _OUTER, products)
    if same:
        writer.add_array(_SAME, [text for pair in sorted(same.items()) for text in pair])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"no such importance matrix: {path}", hint="Make one with `llava-edge imatrix`.")
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} is no importance matrix in GGUF: {error}") from None


def read_correlations(path: Path) -> dict[str, NDArray[np.float32]]:
    """Sums of products of any two inputs, ``[columns, columns]``, of the matrices that the file has them of.

    They stay on disk until they are used. Matrices with the same inputs have the same array.
    """
    reader = _open(path)
    found = {t.name.removesuffix(_OUTER): t.data for t in reader.tensors if t.name.endswith(_OUTER)}
    field = reader.get_field(_SAME)
    pairs = field.contents() if field is not None else []
    return found | {name: found[other] for name, other in zip(pairs[::2], pairs[1::2], strict=True) if other in found}


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Mean squares ``[columns]`` of the inputs of every matrix by name. InputError if it is no such file."""
    reader = _open(path)
    small = (tensor for tensor in reader.tensors if not tensor.name.endswith(_OUTER))
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32).ravel() for tensor in small}
    found: dict[str, NDArray[np.float32]] = {}
    for name, values in tensors.items():
        counts = tensors.get(name.removesuffix(_SUMS) + _COUNTS)
        if name.endswith(_SUMS) and counts is not None and len(counts) == 1 and counts[0] > 0:
            found[name.removesuffix(_SUMS)] = np.ascontiguousarray(values / counts[0], dtype=np.float32)
    if not found:
        raise InputError(f"{path} holds no importance matrix: it has no tensors {_SUMS[1:]} and {_COUNTS[1:]}")
    return found
