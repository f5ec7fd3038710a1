"""Building the C library, and what its functions say in numbers."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OK, INVALID_ARGUMENT, BUSY, NOT_FOUND, IO, MODEL_INVALID, UNSUPPORTED = 0, 10, 11, 20, 21, 30, 31
IMAGE_INVALID, IMAGE_LIMIT, IMAGE_UNSUPPORTED, CONTEXT_FULL, STOPPED, STATE_INVALID = 40, 41, 42, 50, 51, 60
KNOWN = {OK, INVALID_ARGUMENT, NOT_FOUND, IO, MODEL_INVALID, UNSUPPORTED, 32, IMAGE_INVALID, IMAGE_LIMIT,
         IMAGE_UNSUPPORTED, CONTEXT_FULL, STATE_INVALID, 70, 80}  # fmt: skip


def tool(*names: str) -> str:
    """A program by one of its names; the tests that need it are skipped without it."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"no {names[0]} on this machine, which building the C library needs")
    return found


def command(*args: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run a program that has to succeed."""
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_int32) for name in ("n_ctx", "n_threads", "n_gpu_layers", "image_tokens", "self_check")),
    )


def load(library, directory) -> int:
    handle = ctypes.c_void_p(1)
    status = library.llava_edge_model_load(str(directory).encode(), None, ctypes.byref(handle))
    assert bool(handle) == (status == OK)
    return status


def said(library) -> str:
    return library.llava_edge_last_error().decode()


def manifest_of(nano) -> dict:
    return json.loads((nano / "llava-edge.json").read_text())
