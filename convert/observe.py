"""What llama.cpp computes on the way: its evaluation callback, tensor by tensor.

The binding hands over a bare pointer to ``ggml_tensor``; its layout is repeated here, and a test compares it with
what the library says of the same tensors.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_F32 = 0


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class Observer:
    """Calls ``see`` with every tensor that ``wants`` takes, once it is computed; it is valid during the call."""

    def __init__(self, wants: Callable[[GgmlTensor], bool], see: Callable[[GgmlTensor], None]) -> None:
        self._wants = wants
        self._see = see
        self.failure: BaseException | None = None
        self.callback: Any = native.llama().ggml_backend_sched_eval_callback(self._on_tensor)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.failure is not None:
            raise self.failure

    def _on_tensor(self, pointer: Any, ask: bool, _data: Any) -> bool:
        """llama.cpp asks first whether a tensor is wanted, and shows it once it is computed."""
        try:
            tensor = ctypes.cast(pointer, ctypes.POINTER(GgmlTensor)).contents
            if not self._wants(tensor):
                return not ask
            if not ask:
                self._see(tensor)
        except BaseException as failure:  # must not pass through C
            self.failure = failure
            return False
        return True


def rows_of(tensor: GgmlTensor) -> NDArray[np.float32]:
    """A copy of a float32 matrix in the CPU's memory, ``[rows, columns]``."""
    columns, rows = tensor.ne[0], tensor.ne[1]
    if tensor.type != _F32 or tensor.nb[0] != 4 or tensor.ne[2] * tensor.ne[3] != 1 or not tensor.data:
        raise TypeError(f"tensor {tensor.name!r} is no matrix of float32")
    last = (rows - 1) * tensor.nb[1] // 4 + columns
    flat = np.frombuffer((ctypes.c_float * last).from_address(tensor.data), dtype=np.float32)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (tensor.nb[1], 4)).copy()
