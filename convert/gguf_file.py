"""Writing GGUF files of floats: what language model and mmproj have in common.

Tensors are announced first and read one by one while the file is written, so that a model of any size takes the
memory of its largest tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np

from llava_edge.convert.tower import Lazy
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

FloatType = Literal["F32", "F16", "BF16"]
_FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "F32": gguf.LlamaFileType.ALL_F32,
}
_LARGEST_F16 = 65504.0


class TensorWriter:
    """A GGUF file in the making. Matrices take ``float_type``, vectors stay in float32."""

    def __init__(self, path: Path, arch: gguf.MODEL_ARCH, arch_name: str, float_type: FloatType) -> None:
        self.gguf = gguf.GGUFWriter(path, arch_name, use_temp_file=False)
        self.arch = arch
        self._type = float_type
        self._tensors: list[tuple[str, Lazy, FloatType]] = []
        self.gguf.add_file_type(_FILE_TYPES[float_type])
        self.gguf.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(self, name: str, tensor: Lazy, *, keep_float32: bool = False) -> None:
        """Announce a tensor; it is read in :meth:`close`."""
        kind: FloatType = "F32" if keep_float32 or len(tensor.shape) < 2 else self._type
        self._tensors.append((name, tensor, kind))
        size = int(np.prod(tensor.shape)) * (4 if kind == "F32" else 2)
        dtype = np.dtype(np.float32 if kind == "F32" else np.float16)
        raw = gguf.GGMLQuantizationType.BF16 if kind == "BF16" else None
        self.gguf.add_tensor_info(name, tensor.shape, dtype, size, raw_dtype=raw)

    def close(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Write everything; ``progress`` hears after each tensor how many there are and of how many."""
        try:
            self.gguf.write_header_to_file()
            self.gguf.write_kv_data_to_file()
            self.gguf.write_ti_data_to_file()
            for number, (name, tensor, kind) in enumerate(self._tensors, 1):
                self.gguf.write_tensor_data(_encoded(name, tensor, kind))
                if progress:
                    progress(number, len(self._tensors))
        finally:
            self.gguf.close()


def _encoded(name: str, tensor: Lazy, kind: FloatType) -> NDArray[Any]:
    values = np.ascontiguousarray(tensor.load(), dtype=np.float32)
    if values.shape != tensor.shape:
        raise InputError(f"the tensor {name} came out as {list(values.shape)}; expected {list(tensor.shape)}")
    if kind == "F32":
        return values
    if kind == "BF16":
        bf16: NDArray[Any] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
        return bf16
    if max(values.max(initial=0), -values.min(initial=0)) > _LARGEST_F16:
        raise InputError(
            f"the tensor {name} has values beyond the range of float16, {_LARGEST_F16}", hint="Take --llm-type BF16."
        )
    return values.astype(np.float16)


def tensor_types(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's type and shape (the row's length first, as GGUF has it)."""
    reader: Any = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape)) for t in reader.tensors}
