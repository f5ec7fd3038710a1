"""Giving memory back: what one step of a conversion freed must not add to the peak of the next."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Collect what is unreachable, and let glibc return freed pages, which it otherwise keeps for tensors to come."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
