"""What the machine can do at best: the rate of reading memory, and of multiplying matrices of each type.

The matrix products are llama.cpp's own kernels on one large product, so that the share which a model reaches tells
what shape, attention and everything around the products cost.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from llava_edge import native
from llava_edge.bench.record import Metric

READ_BYTES = 512 << 20
_SIDE, _COLUMNS = 2048, 512
_READ_ROUNDS, _ROUNDS = 10, 5
_HEADER_BYTES = 1 << 20
_CPU_DEVICE = 0


def read_bandwidth(threads: int, *, size: int = READ_BYTES) -> Metric:
    """Bytes a second at which ``threads`` threads together read memory that is in no cache; the best of ten rounds."""
    parts = [np.ones(size // threads // 4, np.int32) for _ in range(threads)]
    rates = []
    for _ in range(_READ_ROUNDS):
        readers = [threading.Thread(target=part.max) for part in parts]
        started = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        rates.append(sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return Metric("bytes/s", max(rates), None, tuple(rates))


def matrix_rate(type_name: str, threads: int) -> Metric:
    """Operations a second of ``[2048, 2048]`` weights of a type times 512 columns; the best of five rounds.

    The kernels that llama.cpp takes for repacked weights are tried too, and the better ones count.
    """
    rates: list[float] = []
    for repacked in (False, True):
        product = _Product(type_name, threads, repacked)
        try:
            if product.ready:
                rates += [2 * _SIDE * _SIDE * _COLUMNS / product.seconds() for _ in range(_ROUNDS)]
        finally:
            product.close()
    return Metric("operations/s", max(rates), None, tuple(rates))


class _Product:
    """One matrix product as a ggml graph on the CPU. Not ``ready`` where no repacked kernel is for the type."""

    def __init__(self, type_name: str, threads: int, repacked: bool) -> None:
        native.llama()
        self._ggml = _library()
        ggml = self._ggml
        self._contexts = [ggml.ggml_init(_InitParams(_HEADER_BYTES, None, True)) for _ in range(2)]
        self._buffers: list[Any] = []
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        kind = int(gguf.GGMLQuantizationType[type_name])
        weights = ggml.ggml_new_tensor_2d(self._contexts[0], kind, _SIDE, _SIDE)
        inputs = ggml.ggml_new_tensor_2d(self._contexts[1], int(gguf.GGMLQuantizationType.F32), _SIDE, _COLUMNS)
        self._graph = ggml.ggml_new_graph(self._contexts[1])
        ggml.ggml_build_forward_expand(self._graph, ggml.ggml_mul_mat(self._contexts[1], weights, inputs))
        self.ready = self._place(weights, inputs, repacked)
        if self.ready:
            data = quantized_rows(type_name, _SIDE, _SIDE)
            ggml.ggml_backend_tensor_set(weights, data.ctypes.data, 0, data.nbytes)
            columns = np.random.default_rng(1).standard_normal((_COLUMNS, _SIDE)).astype(np.float32)
            ggml.ggml_backend_tensor_set(inputs, columns.ctypes.data, 0, columns.nbytes)
            self.seconds()

    def seconds(self) -> float:
        started = time.perf_counter()
        self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        return time.perf_counter() - started

    def close(self) -> None:
        for buffer in self._buffers:
            self._ggml.ggml_backend_buffer_free(buffer)
        self._ggml.ggml_backend_free(self._backend)
        for context in self._contexts:
            self._ggml.ggml_free(context)

    def _place(self, weights: Any, inputs: Any, repacked: bool) -> bool:
        ggml = self._ggml
        plain = ggml.ggml_backend_cpu_buffer_type()
        place = _repacking_buffer_type(ggml) if repacked else plain
        if not place:
            return False
        self._buffers.append(ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._contexts[0], place))
        self._buffers.append(ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._contexts[1], plain))
        device = ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
        # A tensor in this memory without kernels for it can't be multiplied; the device knows.
        return not repacked or bool(ggml.ggml_backend_dev_supports_op(device, ggml.ggml_graph_node(self._graph, -1)))


def quantized_rows(type_name: str, rows: int, row_length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``rows`` of normal random weights as raw bytes of a type; a few rows are quantised and repeated."""
    native.llama()
    ggml = _library()
    kind = int(gguf.GGMLQuantizationType[type_name])
    few = min(rows, 8)
    values = (np.random.default_rng(0).standard_normal((few, row_length)) * 0.02).astype(np.float32)
    size = ggml.ggml_row_size(kind, row_length)
    tile = np.empty((few, size), np.uint8)
    importance = np.ones(row_length, np.float32)
    ggml.ggml_quantize_chunk(kind, values.ctypes.data, tile.ctypes.data, 0, few, row_length, importance.ctypes.data)
    repeated: np.ndarray[Any, np.dtype[np.uint8]] = np.resize(tile, (rows, size))
    return repeated


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _SIZE, _INT, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, _LONG, _LONG)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_graph_node": (_POINTER, (_POINTER, _INT)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_row_size": (_SIZE, (_INT, _LONG)),
    "ggml_quantize_chunk": (_SIZE, (_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER)),
    "ggml_backend_cpu_init": (_POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_POINTER, _INT)),
    "ggml_backend_cpu_buffer_type": (_POINTER, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, (_POINTER, _POINTER)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_free": (None, (_POINTER,)),
    "ggml_backend_dev_by_type": (_POINTER, (_INT,)),
    "ggml_backend_dev_backend_reg": (_POINTER, (_POINTER,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_POINTER, _POINTER)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, ctypes.c_char_p)),
}


class _Library:
    """The functions of libggml that are used here, with their types."""

    def __init__(self, library: Any) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"{name} has no signature here")


def _library() -> _Library:
    from llama_cpp._ggml import libggml

    return _Library(libggml)


def _repacking_buffer_type(ggml: _Library) -> Any:
    """The first memory in which the CPU's device lays weights out for its faster kernels, None without one.

    None as well where that is AMX's, which no model of ours is loaded into either.
    """
    if native.multiplies_with_amx():
        return None
    device = ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    found = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device)
    return found[0] if found else None
