"""Running the tools that build the C library."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
