"""How the processors are shared with other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SEEN = """
import os
from llava_edge import native
with native._patient_threads():
    print(os.environ["GOMP_SPINCOUNT"])
print("GOMP_SPINCOUNT" in os.environ)
"""


def seen(**environment: str) -> list[str]:
    """What OpenMP is told, and whether programs that are started later would be told too."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", SEEN], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.fixture
def busy() -> Iterator[None]:
    """A program that never pauses."""
    command = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as loop:
        assert loop.stdout is not None
        loop.stdout.readline()
        yield
        loop.kill()


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="only Linux tells what runs")
@pytest.mark.usefixtures("busy")
def test_threads_wait_briefly_where_another_program_runs() -> None:
    assert seen() == ["1000", "False"]


def test_what_the_user_says_stays() -> None:
    assert seen(GOMP_SPINCOUNT="77") == ["77", "True"]
