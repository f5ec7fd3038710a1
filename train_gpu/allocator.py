"""How the C library hands out memory while a CPU trains."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1  # as an unsigned number it is the largest


def keep_freed_memory() -> None:
    """Use freed memory again, where glibc would give every large block back to the kernel.

    A step frees its activations, some gigabytes, and the next one needs as many: fresh pages would have to be zeroed
    and mapped one by one. The process keeps the size of its largest step. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        log.debug("the C library does not take these settings of malloc")
