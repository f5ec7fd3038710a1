"""Writing GGUF files of floats: what language model and mmproj have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FloatType = Literal["F16", "F32"]
_FILE_TYPES = {"F16": gguf.LlamaFileType.MOSTLY_F16, "F32": gguf.LlamaFileType.ALL_F32}
_LARGEST_F16 = 65504.0


class TensorWriter:
    """A GGUF file in the making. Matrices take ``float_type``, vectors stay in float32."""

    def __init__(self, path: Path, arch: gguf.MODEL_ARCH, arch_name: str, float_type: FloatType) -> None:
        self.gguf = gguf.GGUFWriter(path, arch_name, use_temp_file=False)
        self.arch = arch
        self._half = float_type == "F16"
        self.gguf.add_file_type(_FILE_TYPES[float_type])
        self.gguf.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(self, name: str, tensor: NDArray[np.float32], *, keep_float32: bool = False) -> None:
        """Add a tensor; InputError where float16 can't hold it."""
        if self._half and tensor.ndim > 1 and not keep_float32:
            if np.abs(tensor).max() > _LARGEST_F16:
                raise InputError(f"the tensor {name} has values beyond the range of float16, {_LARGEST_F16}")
            self.gguf.add_tensor(name, tensor.astype(np.float16))
        else:
            self.gguf.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))

    def close(self) -> None:
        """Write everything."""
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def tensor_types(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's type and shape (the row's length first, as GGUF has it)."""
    reader: Any = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape)) for t in reader.tensors}
