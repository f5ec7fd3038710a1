"""What a model has to read and multiply, from its GGUF files: the numerators of MBU and MFU.

Counted are the products with weights. Those of attention with itself are left out, so that shares are a little low
for long contexts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

_KV_BYTES = 2  # the cache is float16


@dataclass(frozen=True)
class Tensor:
    """One tensor: ``shape`` has the row's length first, as GGUF has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Weights:
    """Tensors and the hyper-parameters that the counts need; zero where a file has none."""

    tensors: tuple[Tensor, ...]
    context_length: int
    layers: int
    kv_heads: int
    head_width: int
    image_size: int
    patch_size: int
    feature_layer: int

    @property
    def types(self) -> dict[str, int]:
        """Tensors by type."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors).items()))

    @property
    def matrix_types(self) -> set[str]:
        """The types of those that are multiplied with."""
        return {t.type for t in self.tensors if len(t.shape) > 1}

    def decode_bytes(self, depth: float) -> float:
        """Bytes read for one token after ``depth`` others: all weights but a table of single rows, and the KV cache."""
        untied = any(tensor.name == "output.weight" for tensor in self.tensors)
        read = sum(t.bytes for t in self.tensors if not (untied and t.name == "token_embd.weight"))
        return read + 2 * self.layers * self.kv_heads * self.head_width * _KV_BYTES * depth

    def prefill_flops(self) -> Counter[str]:
        """Operations for one token of a prompt, by the weights' type; the output matrix sees only the last token."""
        return _flops(t for t in self.tensors if t.name.startswith("blk."))

    def encode_flops(self) -> Counter[str]:
        """Operations for one picture, by the weights' type."""
        patches = (self.image_size // self.patch_size) ** 2 if self.patch_size else 0
        once = _flops(t for t in self.tensors if "position" not in t.name and not self._unread(t))
        return Counter({kind: count * patches for kind, count in once.items()})

    def _unread(self, tensor: Tensor) -> bool:
        """Whether it belongs to a block after the last hidden state that is read."""
        block = tensor.name.split(".")[2] if tensor.name.startswith("v.blk.") else ""
        return bool(self.feature_layer) and block.isdecimal() and int(block) >= self.feature_layer


def _flops(tensors: Any) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            counts[tensor.type] += 2 * tensor.elements
    return counts


def read_weights(path: Path) -> Weights:
    """Read what is counted from a GGUF file; the tensors themselves are not read."""
    reader: Any = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()

    def number(key: str) -> int:
        field = reader.fields.get(f"{arch}.{key}")
        value = field.contents() if field else 0
        return int(value) if isinstance(value, int) else 0

    heads = number("attention.head_count")
    layers = reader.fields.get("clip.vision.feature_layer")
    return Weights(
        tensors=tuple(
            Tensor(t.name, t.tensor_type.name, tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in reader.tensors
        ),
        context_length=number("context_length"),
        layers=number("block_count"),
        kv_heads=number("attention.head_count_kv") or heads,
        head_width=number("attention.key_length") or (number("embedding_length") // heads if heads else 0),
        image_size=number("vision.image_size"),
        patch_size=number("vision.patch_size"),
        feature_layer=max((int(n) for n in layers.contents()), default=0) if layers else 0,
    )
