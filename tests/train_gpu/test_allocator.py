"""Memory that a step frees is used again by the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys, torch
from llava_edge.train_gpu.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    parts = [torch.ones(1 << 20) for _ in range(64)]  # 256 MiB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
sbrk = ctypes.CDLL(None).sbrk
sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
begin = sbrk(0)
parts = [torch.empty(1 << 28, dtype=torch.uint8) for _ in range(12)]  # 3 GiB that nobody touches
grown = sbrk(0) - begin
parts.clear()
print(grown, sbrk(0) - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_mapped_once() -> None:
    (kept, grown, left), (fresh, *_) = (
        map(int, subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, check=True).stdout.split())
        for mode in ("keep", "as it is")
    )
    assert kept < fresh / 10
    assert left == grown > 2 << 30
