"""How much memory there is, and how much a model needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_edge.gguf_header import Header

GIB = 1 << 30
# Runtime, buffers and the context of a small model; the KV cache of a large one is in the factor.
_BASE_BYTES = GIB // 4
_FACTOR = 1.2
# What a program that has all of a model's files in memory may take for its contexts: the rest is other programs'.
_SHARE = 0.75
_KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}


def total_bytes() -> int | None:
    """Memory that this process may have: the machine's, or its container's limit; None if nothing tells."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        found = min(found, limit)
    return found


def needed_bytes(file_bytes: int) -> int:
    """An estimate of what a model of so many bytes on disk needs in memory."""
    return int(file_bytes * _FACTOR) + _BASE_BYTES


def context_bytes(llm: Header, n_ctx: int, kv_type: str) -> float | None:
    """Bytes of the KV cache of a context of ``n_ctx`` tokens; None if its header doesn't tell."""

    def number(key: str) -> int | None:
        field = llm.fields.get(f"{llm.architecture}.{key}")
        return field.value if field is not None and type(field.value) is int and field.value > 0 else None

    layers, width, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    if layers is None or width is None or heads is None or kv_heads is None:
        return None
    length = width // heads
    keys, values = number("attention.key_length") or length, number("attention.value_length") or length
    return n_ctx * layers * kv_heads * (keys + values) * _KV_BYTES[kv_type]


def contexts_that_fit(file_bytes: int, context_bytes: float, most: int) -> int:
    """From 1 to ``most`` contexts of so many bytes beside a model's files, in three quarters of the memory."""
    total = total_bytes()
    if total is None:
        return most
    left = total * _SHARE - file_bytes - _BASE_BYTES
    return max(1, min(most, int(left // context_bytes)))
