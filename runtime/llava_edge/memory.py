"""How much memory there is, and how much a model needs."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30
# Runtime, buffers and the context of a small model; the KV cache of a large one is in the factor.
_BASE_BYTES = GIB // 4
_FACTOR = 1.2


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
